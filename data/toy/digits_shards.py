"""Digit questions as webdataset shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.toy.digits import LEVELS, Modality, Split, draw_problem
from data.toy.digits_media import FRAME_PIXELS, DigitBank, encode_mp4, encode_png, load_bank, strip

RL_LEVELS: Mapping[int, float] = dict(zip(LEVELS, (1.0, 1.0, 1.5, 2.0, 2.5), strict=True))
"""Mix of the bundled questions: all levels, leaning to the hard ones."""


def build_digit_shards(
    out_dir: str | Path,
    modality: Modality,
    split: Split,
    num_questions: int,
    seed: int,
    levels: Mapping[int, float] | None = None,
) -> list[Path]:
    """Write digit questions of one modality as shards; the same arguments give the same bytes.

    Args:
        out_dir: Folder for the shards; made if it is missing, shards in it are replaced.
        modality: text, image or video.
        split: train or held_out; the two share no digit image and no digit sequence.
        num_questions: How many.
        seed: Of all draws.
        levels: Relative weight per number of digits; `None` means `RL_LEVELS`.

    Returns:
        Paths of the shards.
    """
    if num_questions < 1:
        raise DataError(
            f"digits: too few questions, got {num_questions}, expected at least 1; raise "
            "num_questions"
        )
    samples = digit_samples(modality, split, num_questions, seed, levels)
    return write_shards(out_dir, samples, overwrite=True)


def digit_samples(
    modality: Modality,
    split: Split,
    num_questions: int,
    seed: int,
    levels: Mapping[int, float] | None = None,
) -> Iterator[ShardSample]:
    """Yield the samples of `build_digit_shards`."""
    bank = load_bank(split)
    for index in range(num_questions):
        rng = np.random.default_rng([seed, index, *f"{modality} {split}".encode()])
        problem = draw_problem(rng, split, levels or RL_LEVELS)
        key = f"digits-{modality}-{split}-{seed}-{index:06d}-{problem.kind}-{problem.level}"
        fields = {
            "id": key,
            "question": problem.text(modality),
            "answer": problem.answer,
            "answer_type": problem.answer_type,
            "choices": list(problem.choices),
            "source": f"digits-{modality}",
        }
        yield ShardSample(key, fields, draw_media(rng, bank, problem.digits, modality))


def draw_media(
    rng: np.random.Generator, bank: DigitBank, digits: tuple[int, ...], modality: Modality
) -> tuple[tuple[str, bytes], ...]:
    """Return the media files of a question: none for text, else one `(extension, content)`."""
    if modality == "image":
        return (("png", encode_png(strip([bank.tile(rng, digit) for digit in digits]))),)
    if modality == "video":
        return (("mp4", encode_mp4([bank.tile(rng, digit, FRAME_PIXELS) for digit in digits])),)
    return ()

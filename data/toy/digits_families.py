"""Digit questions by families: one to train on, and others that a model may learn or forget beside
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.toy.digits import DigitKind, Modality, Split, draw_problem
from data.toy.digits_media import load_bank
from data.toy.digits_shards import draw_media

SHORT = {3: 1.0, 4: 1.0, 5: 1.0}


@dataclass(frozen=True, slots=True)
class Family:
    """Some kinds of questions in one modality.

    Attributes:
        modality: text, image or video.
        kinds: Relative weight per kind.
        levels: Relative weight per number of digits.
    """

    modality: Modality
    kinds: Mapping[DigitKind, float]
    levels: Mapping[int, float]


CORPUS = "corpus"
LEARNED: Mapping[DigitKind, float] = {"sum": 1.0, "largest": 1.0}
FAMILIES: Mapping[str, Family] = {
    CORPUS: Family("image", LEARNED, SHORT),
    "longer": Family("image", LEARNED, {6: 1.0}),
    "video": Family("video", LEARNED, SHORT),
    "reading": Family("image", {"read": 1.0}, SHORT),
    "counting": Family("image", {"even": 1.0, "equal": 1.0}, SHORT),
    "text-arithmetic": Family("text", {"alternating": 1.0}, SHORT),
}
"""By the source of their questions; the corpus is trained on, the first three need the same
skills, the others were no part of the training.
"""


def write_families(
    out_dir: str | Path, num_train: int, num_held_out: int, seed: int = 0
) -> dict[str, int]:
    """Write a folder of shards `<family>-<split>` of every family held out, and of the corpus to
    train on; the same arguments give the same bytes.

    Args:
        out_dir: Made if it is missing; shards in it are replaced.
        num_train: Questions to train on.
        num_held_out: Questions of each family to evaluate on; the splits share no digit image and
            no digit sequence.
        seed: Of all draws.

    Returns:
        Number of questions by folder.

    Raises:
        DataError: Fewer than one question.
    """
    if min(num_train, num_held_out) < 1:
        raise DataError(
            f"digit families: too few questions, got {num_train} and {num_held_out}, expected at "
            "least 1 of each; raise the numbers"
        )
    wanted: dict[tuple[str, Split], int] = {(CORPUS, "train"): num_train}
    wanted |= {(name, "held_out"): num_held_out for name in FAMILIES}
    counts = {}
    for (name, split), count in wanted.items():
        folder = f"{name}-{split}"
        write_shards(
            Path(out_dir) / folder, family_samples(name, split, count, seed), overwrite=True
        )
        counts[folder] = count
    return counts


def family_samples(name: str, split: Split, count: int, seed: int) -> Iterator[ShardSample]:
    """Yield the first samples of a family; its name is their source."""
    family, bank = FAMILIES[name], load_bank(split)
    for index in range(count):
        rng = np.random.default_rng([seed, index, *f"{name} {split}".encode()])
        problem = draw_problem(rng, split, family.levels, family.kinds, choice_fraction=0)
        key = f"{name}-{split}-{seed}-{index:06d}-{problem.kind}-{problem.level}"
        fields = {
            "id": key,
            "question": problem.text(family.modality),
            "answer": problem.answer,
            "answer_type": problem.answer_type,
            "source": name,
        }
        yield ShardSample(key, fields, draw_media(rng, bank, problem.digits, family.modality))

"""The easy-vqa package as shards: 5,000 pictures of one coloured shape and 48,248 questions about
them.

Its 13 answers are a closed set, so every question becomes multiple choice among the answers of its
own kind: yes and no, the three shapes, or the eight colours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import numpy as np

from data.errors import DataError
from data.sample import ShardSample
from data.shard_writer import write_shards

ANSWER_KINDS: tuple[tuple[str, ...], ...] = (
    ("yes", "no"),
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


def build_easy_vqa(
    out_dir: str | Path, *, samples_per_shard: int = 5000, overwrite: bool = False
) -> dict[Split, int]:
    """Write `train` and `test` folders of shards and return the number of questions of each; always
    the same bytes.

    Raises:
        DataError: The package is not installed or not as expected, or the folder has shards
            already.
    """
    try:
        package = distribution("easy-vqa")
    except PackageNotFoundError as error:
        raise DataError(
            "easy-vqa: the package is not installed; install it with: pip install easy-vqa"
        ) from error
    counts: dict[Split, int] = {}
    for split in SPLITS:
        samples = list(easy_vqa_samples(package, split))
        write_shards(Path(out_dir) / split, samples, samples_per_shard, overwrite=overwrite)
        counts[split] = len(samples)
    return counts


def easy_vqa_samples(package: Distribution, split: Split) -> Iterator[ShardSample]:
    """Yield one sample per question of a split, in the package's order; the image is repeated in
    each.
    """
    folder = Path(str(package.locate_file(f"easy_vqa/data/{split}")))
    try:
        records = json.loads((folder / "questions.json").read_text())
        images = {
            image: (folder / "images" / f"{image}.png").read_bytes()
            for image in {record[2] for record in records}
        }
    except (OSError, ValueError) as error:
        raise DataError(
            f"easy-vqa: the package's files cannot be read ({error}); install it again"
        ) from error
    for index, (text, answer, image) in enumerate(records):
        yield _sample(split, index, text, answer, image, images[image])


def _sample(
    split: Split, index: int, text: str, answer: str, image: int, picture: bytes
) -> ShardSample:
    kind = next((answers for answers in ANSWER_KINDS if answer in answers), None)
    if kind is None:
        raise DataError(
            f"easy-vqa: unknown answer, got {answer!r}, expected one of its 13; install version 1.0"
        )
    key = f"easy-vqa-{split}-{index:05d}"
    # The options have another order for every question, so that no letter means an answer by
    # itself.
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(kind))
    choices = [kind[position] for position in order]
    fields = {
        "id": key,
        "question": text[:1].upper() + text[1:],
        "answer": chr(ord("A") + choices.index(answer)),
        "answer_type": "choice",
        "choices": choices,
        "source": "easy-vqa",
        "media": ["png"],
        "image": image,
    }
    return ShardSample(key=key, question=fields, media=[("png", picture)])

"""Pictures of one rectangle on a grid, and where it is, as JSON lines with a folder of pictures.

Coordinates are single digits, so that even a very small model can write them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.toy.digits_media import encode_png
from data.toy.question_files import check_counts, write_lines

NUM_CELLS = 9
CELL_PIXELS = 8
MIN_SIDE = 2
"""Cells that a rectangle has at least on each side."""
SOURCE = "boxes"
QUESTION = "Where is the rectangle? Answer with left, top, right and bottom, each from 0 to 9."
MAX_QUESTIONS = 100_000


def write_boxes(
    out_dir: str | Path, num_train: int, num_held_out: int, seed: int = 0
) -> dict[str, int]:
    """Write train.jsonl, held_out.jsonl and their pictures; the same arguments give the same bytes.

    A line's `metadata` has the `box`: left, top, right, bottom, as lines of the grid from 0 to 9.

    Args:
        out_dir: Made if it is missing; older files of these names are replaced.
        num_train: Questions to train on.
        num_held_out: Questions to evaluate on.
        seed: Of all draws.

    Returns:
        Number of questions by file name.

    Raises:
        DataError: Fewer than one question, or too many.
    """
    counts = {"train": num_train, "held_out": num_held_out}
    check_counts(SOURCE, num_train, num_held_out, MAX_QUESTIONS)
    folder = Path(out_dir)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        lines = [_draw(folder, f"boxes-{split}-{seed}-{index:05d}") for index in range(count)]
        write_lines(folder / f"{split}.jsonl", lines)
    return {f"{split}.jsonl": count for split, count in counts.items()}


def _draw(folder: Path, name: str) -> dict[str, object]:
    """Write the picture of one question; returns its line. The name decides all draws."""
    rng = np.random.default_rng([*name.encode()])
    sides = rng.integers(MIN_SIDE, NUM_CELLS + 1, 2)
    left, top = (int(rng.integers(0, NUM_CELLS - side + 1)) for side in sides)
    box = [left, top, left + int(sides[0]), top + int(sides[1])]
    side = NUM_CELLS * CELL_PIXELS
    pixels = np.full((side, side, 3), rng.integers(0, 60, 3), dtype=np.uint8)
    x1, y1, x2, y2 = (CELL_PIXELS * line for line in box)
    pixels[y1:y2, x1:x2] = rng.integers(160, 256, 3)
    picture = Path("pictures", f"{name}.png")
    (folder / picture).write_bytes(encode_png(pixels))
    return {
        "id": name,
        "question": QUESTION,
        "answer": ", ".join(map(str, box)),
        "answer_type": "box",
        "source": SOURCE,
        "media": [str(picture)],
        "metadata": {"box": box},
    }

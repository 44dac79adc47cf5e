"""What toy question sets that are written as JSON lines have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from data.errors import DataError


def check_counts(source: str, num_train: int, num_held_out: int, most: int) -> None:
    """Check how many questions are wanted.

    Raises:
        DataError: Fewer than one question of a kind, or more than `most` together.
    """
    if min(num_train, num_held_out) < 1 or num_train + num_held_out > most:
        raise DataError(
            f"{source}: cannot make so many questions, got {num_train} and {num_held_out}, "
            f"expected at least one of each and at most {most} together; change the numbers"
        )


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

"""The command line of tools that write toy questions as JSON lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from data.errors import DataError

Writer = Callable[[Path, int, int, int], Mapping[str, int]]
"""Writes train.jsonl and held_out.jsonl to a folder, from how many questions to train and to
evaluate on, and a seed; returns how many are in each file.
"""


def write_from_command_line(
    description: str | None, name: str, num_train: int, write: Writer
) -> int:
    """Read the command line, write the files and say how many questions are in each.

    Args:
        description: What the tool's help says.
        name: Of the questions, and of their folder.
        num_train: Training questions, unless the command line has another number.
        write: What makes them.

    Returns:
        The exit code: 2 if the files cannot be written.
    """
    parser = argparse.ArgumentParser(description=description)
    shown = "(default: %(default)s)"
    folder = Path("datasets", name)
    parser.add_argument("out_dir", type=Path, nargs="?", default=folder, help=f"folder {shown}")
    parser.add_argument(
        "--num-train", type=int, default=num_train, help=f"training questions {shown}"
    )
    parser.add_argument("--num-held-out", type=int, default=100, help=f"held-out questions {shown}")
    parser.add_argument("--seed", type=int, default=0, help=f"random seed {shown}")
    known = parser.parse_args()
    try:
        counts = write(known.out_dir, known.num_train, known.num_held_out, known.seed)
    except DataError as error:
        print(f"make_{name}: {error}", file=sys.stderr)
        return 2
    for file, count in counts.items():
        print(f"{known.out_dir / file}: {count} questions")
    return 0

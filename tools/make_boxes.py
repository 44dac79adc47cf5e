"""Write pictures of rectangles, and where they are, for tools/make_shards.py: OUT_DIR/train.jsonl,
OUT_DIR/held_out.jsonl and OUT_DIR/pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.errors import DataError
from data.toy.boxes import write_boxes


def main() -> int:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "out_dir", type=Path, nargs="?", default=Path("datasets/boxes"), help="default: %(default)s"
    )
    parser.add_argument(
        "--num-train", type=int, default=1000, help="training questions (default: %(default)s)"
    )
    parser.add_argument(
        "--num-held-out", type=int, default=100, help="held-out questions (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        counts = write_boxes(
            arguments.out_dir, arguments.num_train, arguments.num_held_out, arguments.seed
        )
    except DataError as error:
        print(f"make_boxes: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{arguments.out_dir / name}: {count} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())

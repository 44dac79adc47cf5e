"""Write the digit questions of examples/compare_half_formed: shards by family and split."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.errors import DataError
from data.toy.digits_families import write_families


def main() -> int:
    """Read the command line and write the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "out_dir",
        type=Path,
        nargs="?",
        default=Path("datasets/half_formed"),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--num-train", type=int, default=3200, help="training questions (default: %(default)s)"
    )
    parser.add_argument(
        "--num-held-out",
        type=int,
        default=2000,
        help="held-out questions of each family (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        counts = write_families(
            arguments.out_dir, arguments.num_train, arguments.num_held_out, arguments.seed
        )
    except DataError as error:
        print(f"make_digit_families: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{arguments.out_dir / name}: {count} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())

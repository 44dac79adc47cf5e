"""Turn the installed easy-vqa package into train and test shards."""

from __future__ import annotations

import argparse
import sys

from data.errors import DataError
from data.toy.easy_vqa import build_easy_vqa


def main(argv: list[str]) -> int:
    """Write the shards and say how many questions they hold."""
    parser = argparse.ArgumentParser(
        description="Turn the easy-vqa package (pip install easy-vqa) into webdataset shards."
    )
    parser.add_argument(
        "out_dir",
        nargs="?",
        default="datasets/easy_vqa",
        metavar="OUT_DIR",
        help="folder of the shards (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing shards")
    arguments = parser.parse_args(argv)
    try:
        counts = build_easy_vqa(arguments.out_dir, overwrite=arguments.overwrite)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    for split, count in counts.items():
        print(f"{arguments.out_dir}/{split}: {count} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Write the bundled digit questions as webdataset shards: one folder per modality and split."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.toy.digits import MODALITIES
from data.toy.digits_shards import build_digit_shards


def main() -> None:
    """Read the command line and write the shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "out_dir", type=Path, help="shards are written to OUT_DIR/<modality>/<split>/"
    )
    parser.add_argument(
        "--modality",
        choices=MODALITIES,
        nargs="+",
        default=MODALITIES,
        help="which questions (default: all three)",
    )
    parser.add_argument(
        "--num-train",
        type=int,
        default=1000,
        help="training questions per modality (default: %(default)s)",
    )
    parser.add_argument(
        "--num-held-out",
        type=int,
        default=200,
        help="held-out questions per modality (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    for modality in arguments.modality:
        build_digit_shards(
            arguments.out_dir / modality / "train",
            modality,
            "train",
            arguments.num_train,
            arguments.seed,
        )
        build_digit_shards(
            arguments.out_dir / modality / "held_out",
            modality,
            "held_out",
            arguments.num_held_out,
            arguments.seed,
        )


if __name__ == "__main__":
    main()

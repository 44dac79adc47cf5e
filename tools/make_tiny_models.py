"""Train the bundled models from scratch and write their Hugging Face folders."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from zppo_mm.bundled.build import build_tiny_model
from zppo_mm.bundled.recipes import MADE, RECIPES


def main() -> None:
    """Read the command line and build the models one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", type=Path, help="parent of the models' folders")
    parser.add_argument(
        "--model",
        choices=MADE,
        nargs="+",
        default=list(RECIPES),
        help="which models (default: the bundled ones)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    for name in arguments.model:
        build_tiny_model(MADE[name], arguments.out_dir / name, arguments.seed)


if __name__ == "__main__":
    main()

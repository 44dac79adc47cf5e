"""Draw the paper's training corpus from its two public sets, as shards.

`python tools/make_zppo_77k.py OUT_DIR --sets vero=DIR mmfinereason=DIR --config run.yaml`
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from data.errors import DataError
from zppo_mm.config.load import load_config
from zppo_mm.corpus.recipe import load_recipe
from zppo_mm.errors import ZppoError
from zppo_mm.observability.logs import quiet_libraries

RECIPE = Path(__file__).parents[1] / "examples" / "paper" / "zppo_77k.yaml"
DESCRIPTION = """Draw a training corpus from public sets that lie on disk as Parquet, and write
shards with a report of what became of every row (corpus.txt, corpus.json).

The recipe maps columns and subsets and holds caps and filters. The run's configuration says
how long a prompt may be, and whose tokenizer and image processor count. Details: docs/paper.md."""


def named_folder(text: str) -> tuple[str, Path]:
    """Read one `NAME=DIR`."""
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder:
        raise argparse.ArgumentTypeError(f"no folder of a set, got {text!r}, expected NAME=DIR")
    return name, Path(folder)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder for the shards")
    parser.add_argument(
        "--sets",
        nargs="+",
        type=named_folder,
        required=True,
        metavar="NAME=DIR",
        help="folder of each set of the recipe",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run that will train")
    parser.add_argument(
        "--recipe", type=Path, default=RECIPE, help="rules of the corpus (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing shards in OUT_DIR"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="key=value",
        help="options of the run, which take precedence over its file",
    )
    return parser


def main(argv: list[str]) -> int:
    """Build the corpus and print the report; an error is one line and exit status 2."""
    arguments = command_line().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    try:
        recipe = load_recipe(arguments.recipe)
        config = load_config(arguments.config, arguments.options)
        from zppo_mm.corpus.build import build_corpus

        report = build_corpus(
            recipe,
            dict(arguments.sets),
            arguments.out_dir,
            config,
            overwrite=arguments.overwrite,
        )
    except (DataError, ZppoError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report.text())
    print(f"{report.num_samples} samples in {arguments.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

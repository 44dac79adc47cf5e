"""Compare methods over seeds.

`python tools/compare.py examples/compare_digits/compare.yaml [key.sub=value …]`
"""

from __future__ import annotations

import argparse
import os.path
import shlex
import signal
import sys
from pathlib import Path

from zppo_mm.comparison.cells import markdown
from zppo_mm.comparison.launch import run_all
from zppo_mm.comparison.plan import Plan, load_plan
from zppo_mm.comparison.report import MARKDOWN_FILE, PAGE_FILE, write_comparison
from zppo_mm.config.help import add_options, parse_with_options
from zppo_mm.errors import ConfigError
from zppo_mm.observability.logs import configure_logging
from zppo_mm.piped_output import ends_with_its_reader

TRAIN_TOOL = Path(__file__).with_name("train_zppo.py")


def parse(arguments: list[str]) -> tuple[Plan, str]:
    """Read the command line: the comparison, and `run`, `report` or `commands`."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="docs/comparison.md describes the keys of the file."
    )
    parser.add_argument("comparison", type=Path, help="YAML file of the comparison")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--report-only",
        dest="mode",
        action="store_const",
        const="report",
        help="start no run; write the report of the finished ones",
    )
    mode.add_argument(
        "--commands",
        dest="mode",
        action="store_const",
        const="commands",
        help="start no run; print the command of each, for a cluster that starts them itself",
    )
    add_options(parser, "keys of the file, which they override, or options of all runs")
    known = parse_with_options(parser, arguments)
    return load_plan(known.comparison, known.options), known.mode or "run"


def main() -> int:
    """Run what is missing, write the report and print its tables.

    Returns:
        0 if every run is finished, 1 if one failed, 2 if nothing could start.
    """
    configure_logging(None, rank=0)
    # Ended like by Ctrl-C, so that the runs end with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        plan, mode = parse(sys.argv[1:])
    except ConfigError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if mode == "commands":
        with ends_with_its_reader():
            for run in plan.runs:
                print(shlex.join([os.path.relpath(TRAIN_TOOL), *run.arguments]))
        return 0
    failures = run_all(plan, TRAIN_TOOL) if mode == "run" else []
    tables = write_comparison(plan, failures)
    with ends_with_its_reader():
        for table in tables:
            print(f"\n{table.title}\n\n{markdown(table)}")
        print(f"\n{plan.folder / MARKDOWN_FILE}\n{plan.folder / PAGE_FILE}")
    for failure in failures:
        print(f"compare: {failure.run.name} failed: {failure.reason}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

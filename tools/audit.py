"""Count from transcripts whether candidates reveal which one is right.

`python tools/audit.py runs/demo [--steps 51-60]`
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from zppo_mm.comparison.cells import markdown
from zppo_mm.comparison.transcript_audit import as_json, audit_run, audit_table
from zppo_mm.errors import ConfigError
from zppo_mm.piped_output import ends_with_its_reader


def parse_steps(text: str) -> tuple[int, int | None]:
    """Read `A-B`, `A-`, `-B` or `A`."""
    first, dash, last = text.partition("-")
    try:
        return int(first or 0), (int(last) if last else None) if dash else int(first)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"not a range of steps, got {text!r}, expected A-B, A-, -B or A"
        ) from error


def main() -> int:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="docs/comparison.md explains every line."
    )
    parser.add_argument(
        "run_folders",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="folder of a run, such as runs/demo",
    )
    parser.add_argument(
        "--steps",
        type=parse_steps,
        default=(0, None),
        metavar="A-B",
        help="rollout steps: A-B, A-, -B or A (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        audits = {
            str(folder): audit_run(folder, *arguments.steps) for folder in arguments.run_folders
        }
    except ConfigError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    with ends_with_its_reader():
        if arguments.json:
            print(json.dumps({name: as_json(audit) for name, audit in audits.items()}, indent=2))
        else:
            table = audit_table(audits)
            print(f"{markdown(table)}\n\n{table.note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write report.html of a run again, from the run's folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.media.opening import MediaLimits, MediaOpener
from data.sources.reader import SourceReader
from zppo_mm.report.page import write_report


def main() -> None:
    """Read the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", type=Path, help="folder of a run, such as runs/demo")
    parser.add_argument(
        "--examples", type=int, default=4, help="number of questions shown (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not arguments.run_folder.is_dir():
        sys.exit(
            f"make_report: no such folder, got {arguments.run_folder}, expected a run's folder; "
            "give the one under runs/"
        )
    reader, opener = SourceReader(), MediaOpener(MediaLimits())
    try:
        path = write_report(
            arguments.run_folder,
            lambda ref: opener.open_ref(ref, reader).pixels,
            arguments.examples,
        )
    finally:
        opener.close()
        reader.close()
    print(path)


if __name__ == "__main__":
    main()

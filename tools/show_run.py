"""List the files of a run and its held-out accuracy before and after training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zppo_mm.report.run_record import read_run
from zppo_mm.run_folder import RunFolder


def described_files(folder: RunFolder) -> tuple[tuple[str, Path], ...]:
    """Return what a run writes, and where."""
    return (
        ("resolved configuration", folder.config),
        ("metrics", folder.metrics),
        ("evaluations", folder.evaluations),
        ("transcripts", folder.transcripts),
        ("replay buffer by step", folder.buffers),
        ("checkpoints", folder.checkpoints),
        ("trained student, Hugging Face format", folder.hf),
        ("report", folder.report),
    )


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", type=Path, help="folder of a run, such as runs/demo")
    folder = parser.parse_args().run_folder
    if not folder.is_dir():
        sys.exit(
            f"show_run: no such folder, got {folder}, expected a run's folder; give the one under "
            "runs/"
        )
    for name, path in described_files(RunFolder(folder)):
        if path.exists():
            print(f"{name + ':':<38} {path}")
    record = read_run(folder)
    for when, what in record.described_changes():
        print(f"{when + ':':<38} {what}")
    evaluations = record.evaluations
    for label, evaluation in (
        (("before", evaluations[0]), ("after", evaluations[-1])) if evaluations else ()
    ):
        by_source = ", ".join(
            f"{source or 'without source'} {accuracy:.1%}"
            for source, accuracy in evaluation["accuracy_by_source"].items()
        )
        print(
            f"held-out accuracy {label:<6} (step {evaluation['step']}): "
            f"{evaluation['accuracy']:.1%} ({by_source})"
        )


if __name__ == "__main__":
    main()

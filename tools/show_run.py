"""List the files of a run and its held-out accuracy before and after training, or watch it."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from zppo_mm.piped_output import ends_with_its_reader
from zppo_mm.report.run_record import read_config, read_run
from zppo_mm.report.watch import NewLines, describe
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


def watch(folder: RunFolder, seconds: float) -> None:
    """Show a run again and again until its last step, or until Ctrl-C."""
    metrics, evaluations = NewLines(folder.metrics), NewLines(folder.evaluations)
    # From the top of a terminal, over what was there.
    clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
    shown = ""
    while True:
        metrics.read()
        evaluations.read()
        train_iters = read_config(folder).get("train", {}).get("train_iters")
        text = describe([*metrics.rows], [*evaluations.rows], train_iters)
        if text != shown:
            print(f"{clear}{folder}  {text}", flush=True)
            shown = text
        if metrics.rows and train_iters and metrics.rows[-1]["step"] >= train_iters:
            return
        time.sleep(seconds)


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", type=Path, help="folder of a run, such as runs/demo")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="show the newest steps, again every so many seconds (default: %(const)s), until the "
        "run's last step",
    )
    arguments = parser.parse_args()
    folder = arguments.run_folder
    if not folder.is_dir():
        sys.exit(
            f"show_run: no such folder, got {folder}, expected a run's folder; give the one under "
            "runs/"
        )
    with ends_with_its_reader():
        if arguments.watch is None:
            show(folder)
            return
        with suppress(KeyboardInterrupt):
            watch(RunFolder(folder), arguments.watch)


def show(folder: Path) -> None:
    """Print the files of a run that there are, its changes and its accuracy."""
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

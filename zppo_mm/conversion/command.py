"""One command of tools/convert_checkpoint.py, from its arguments to what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ZppoError
from zppo_mm.observability.logs import configure_logging
from zppo_mm.parallel import failures
from zppo_mm.parallel import groups as parallel

if TYPE_CHECKING:
    from zppo_mm.conversion.choosing import Choice


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a command.

    Attributes:
        text: For the terminal; empty on ranks other than the first.
        exit_code: 0, or 1 when something differs or failed.
    """

    text: str
    exit_code: int


def run_command(
    name: str, folders: list[Path], layout: ParallelConfig, choice: Choice = "newest"
) -> Outcome:
    """Run `import`, `export`, `verify` or `inspect`; every rank calls it.

    Args:
        name: The command.
        folders: Its folders, in the order of the command line.
        layout: Of the processes.
        choice: Which checkpoint of a run `export` takes.
    """
    try:
        parallel.initialize(layout, seed=0)
        configure_logging(None, parallel.rank())
        with failures.translate_collective_errors():
            outcome = _run(name, folders, layout, choice)
        parallel.shutdown()
    except ZppoError as error:
        # Every rank has the same error; one reports it.
        return Outcome(f"convert_checkpoint: {error}" if parallel.rank() == 0 else "", 1)
    finally:
        # After an error too, or the process could be aborted at its end, with another exit code.
        parallel.leave()
    return outcome


def _run(name: str, folders: list[Path], layout: ParallelConfig, choice: Choice) -> Outcome:
    # What a command does not need is not imported: transformers' models and a run's parts take
    # seconds.
    if name == "import":
        from zppo_mm.conversion.importing import import_folder

        import_folder(folders[0], folders[1], layout)
        return Outcome("", 0)
    if name == "export":
        from zppo_mm.conversion.exporting import export_folder

        export_folder(folders[0], folders[1], layout, choice)
        return Outcome("", 0)
    if name == "inspect":
        from zppo_mm.conversion.description import describe_folder

        return Outcome(describe_folder(folders[0]), 0)
    from zppo_mm.conversion.verify import verify_folder, verify_folders

    report = (
        verify_folder(folders[0]) if len(folders) == 1 else verify_folders(folders[0], folders[1])
    )
    return Outcome(report.text(), 0 if report.good else 1)

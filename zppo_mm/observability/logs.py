"""Log lines of a run: rank 0 to the terminal and to a file, the other ranks their warnings
only.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from tqdm import tqdm


def quiet_libraries() -> None:
    """Hide warnings of libraries that a user can do nothing about; call before megatron-core is
    imported.

    megatron-core warns at import of every optional package that is not installed, and torch of the
    names that megatron-core calls.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


class ProgressBarHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            # The logging module's own way: a log line that cannot be written is reported once and
            # never stops the program.
            self.handleError(record)


def configure_logging(log_file: Path | None, rank: int) -> None:
    """Set the root logger's handlers; call once per process, before the first log line.

    Args:
        log_file: Rank 0 also appends to it; `None` writes to the terminal alone.
        rank: Ranks other than 0 show warnings and errors only, marked with their number.
    """
    mark = "" if rank == 0 else f"[rank {rank}] "
    formatter = logging.Formatter(
        f"%(asctime)s {mark}%(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    handlers: list[logging.Handler] = [ProgressBarHandler()]
    if log_file is not None and rank == 0:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, handlers=handlers, force=True
    )
    # megatron-core lists every parameter and option at the information level.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    # The HTTP client writes a line per request.
    logging.getLogger("httpx2").setLevel(logging.WARNING)

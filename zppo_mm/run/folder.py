"""A run's folder: who writes to it, what a start that failed leaves of it, and records that no
checkpoint continues.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from zppo_mm.config.load import save_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.observability.logs import LOG_FILE, configure_logging
from zppo_mm.observability.sinks import EVALUATION_FILE, METRICS_FILE, PARITY_FILE
from zppo_mm.observability.transcripts import (
    BUFFER_FOLDER,
    HELD_OUT_FOLDER,
    TRANSCRIPTS_FOLDER,
    discard_steps_after,
)
from zppo_mm.parallel import groups as parallel

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
TENSORBOARD_FOLDER = "tensorboard"
SET_ASIDE_FOLDER = "earlier"
_STEP_RECORDS = (METRICS_FILE, EVALUATION_FILE, TRANSCRIPTS_FOLDER, BUFFER_FOLDER, HELD_OUT_FOLDER)
_OTHER_RECORDS = (PARITY_FILE, TENSORBOARD_FOLDER)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder's lock on rank 0 as long as the process lives; the system lets go of it when
    the process dies.

    Rank 0 logs to the folder inside the block. A folder that was made here is taken away again by
    an error before a run has begun in it.

    Raises:
        ConfigError: On every rank, if another run writes to the folder or it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock: IO[str] | None = None
    problem = ""
    if parallel.rank() == 0:
        try:
            lock = _lock(folder)
        except BlockingIOError:
            problem = (
                f"{folder}: another process writes to this run, got a lock that is held, expected "
                "it free; wait for it to end or end it, or give another name"
            )
        except OSError as error:
            problem = (
                f"{folder}: the run's folder cannot be used, got {error}, expected a place to "
                "write to; correct output_dir"
            )
    problem = parallel.broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    configure_logging(folder, parallel.rank())
    try:
        yield
    except BaseException:
        if parallel.rank() == 0 and missing:
            _take_away(missing)
        raise
    finally:
        if lock is not None:
            lock.close()


def _lock(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK_FILE).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock


def _take_away(made: list[Path]) -> None:
    """Remove the folders that were made, if nothing but the lock and the log came into them."""
    if {path.name for path in made[0].iterdir()} - {LOCK_FILE, LOG_FILE}:
        return
    configure_logging(None, rank=0)  # what is said from now on has no file to go to
    for name in (LOCK_FILE, LOG_FILE):
        (made[0] / name).unlink(missing_ok=True)
    with suppress(OSError):  # another run has begun beside it
        for path in made:
            path.rmdir()


def prepare_folder(config: RunConfig, folder: Path, done: int | None) -> None:
    """Write the configuration, and take away what a killed run wrote after the checkpoint that goes
    on; every rank calls it.

    Args:
        config: The run.
        folder: Its folder, claimed.
        done: Steps of the checkpoint that goes on; `None` without one. Then earlier records are
            moved aside, and none is removed.
    """
    if parallel.rank() == 0:
        if done is None:
            set_records_aside(folder)
        else:
            discard_steps_after(folder, done)
        if done is None or done < config.train.train_iters:
            save_config(config, folder / CONFIG_FILE)
    parallel.barrier()


def set_records_aside(folder: Path) -> Path | None:
    """Move the records of a run that has no checkpoint into a folder of their own; returns it,
    `None` if there are none.
    """
    if not any(_holds_something(folder / name) for name in _STEP_RECORDS):
        return None
    names = (f"{SET_ASIDE_FOLDER}_{number}" for number in itertools.count(1))
    target = next(folder / name for name in names if not (folder / name).exists())
    target.mkdir()
    for name in (*_STEP_RECORDS, *_OTHER_RECORDS):
        if (folder / name).exists():
            os.replace(folder / name, target / name)
    logger.warning(
        "%s has records of an earlier start but no checkpoint: the run starts again, they are kept "
        "in %s",
        folder,
        target,
    )
    return target


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0

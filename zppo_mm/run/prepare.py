"""A run's folder: who writes to it, what a failed start leaves of it, and records that no
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
from zppo_mm.observability.logs import configure_logging
from zppo_mm.observability.transcripts import discard_steps_after
from zppo_mm.parallel import groups as parallel
from zppo_mm.run_folder import RunFolder

logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: RunFolder, restart: bool = False) -> Iterator[None]:
    """Hold the folder's lock on rank 0 as long as the process lives; the system lets go of it when
    the process dies.

    Rank 0 logs to the folder inside the block. A folder that was made here is taken away again by
    an error before a run has begun in it.

    Args:
        folder: Of the run.
        restart: Whether what an earlier run left in it is moved aside first.

    Raises:
        ConfigError: On every rank, if another run writes to the folder or it cannot be made.
    """
    missing = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    lock: IO[str] | None = None
    aside: Path | None = None
    problem = ""
    if parallel.rank() == 0:
        try:
            lock = _lock(folder)
            aside = _set_run_aside(folder) if restart else None
        except BlockingIOError:
            problem = (
                f"{folder}: another process writes to this run, got a lock that is held, expected "
                "it free; wait for it to end or end it, or give another name"
            )
        except OSError as error:
            problem = (
                f"{folder}: the run's folder cannot be used, got {error}, expected a path to "
                "write to; correct output_dir"
            )
    problem = parallel.broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    configure_logging(folder.log, parallel.rank())
    if aside is not None:
        logger.warning("--restart: the earlier run is in %s, remove it to free its disk", aside)
    try:
        yield
    except BaseException:
        if parallel.rank() == 0 and missing:
            _remove_made(folder, missing)
        raise
    finally:
        if lock is not None:
            lock.close()


def _lock(folder: RunFolder) -> IO[str]:
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = folder.lock.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock


def _remove_made(folder: RunFolder, made: list[Path]) -> None:
    """Remove the folders that were made, if nothing but the lock and the log came into them."""
    own = (folder.lock, folder.log)
    if set(made[0].iterdir()) - set(own):
        return
    configure_logging(None, rank=0)  # the file of the log goes
    for path in own:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # another run has begun beside it
        for path in made:
            path.rmdir()


def prepare_folder(config: RunConfig, folder: RunFolder, done: int | None) -> None:
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
            save_config(config, folder.config)
    parallel.barrier()


def _set_run_aside(folder: RunFolder) -> Path | None:
    """Move everything that a run left in its folder into a folder of its own there; returns it,
    `None` if there is nothing.

    Raises:
        OSError: It cannot be moved; what is moved already stays there.
    """
    earlier = list(itertools.takewhile(Path.exists, folder.earlier_records()))
    left = [path for path in folder.path.iterdir() if path not in (folder.lock, *earlier)]
    if not left:
        return None
    target = next(path for path in folder.earlier_records() if path not in earlier)
    target.mkdir()
    # Checkpoints first: without them, a start after a kill in between keeps the records too.
    for path in sorted(left, key=lambda path: path != folder.checkpoints):
        os.replace(path, target / path.name)
    return target


def set_records_aside(folder: RunFolder) -> Path | None:
    """Move the records of a run that has no checkpoint into a folder of their own; returns it,
    `None` if there are none.
    """
    if not any(_holds_something(path) for path in folder.records):
        return None
    target = next(path for path in folder.earlier_records() if not path.exists())
    target.mkdir()
    for path in (*folder.records, folder.changes, folder.parity, folder.tensorboard):
        if path.exists():
            os.replace(path, target / path.name)
    logger.warning(
        "%s has records of an earlier start but no checkpoint: the run starts again, they are kept "
        "in %s",
        folder,
        target,
    )
    return target


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0

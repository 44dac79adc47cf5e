"""The copy of a run's folder in an object store, from its start to its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from data.remote_objects import RemoteObjects
from zppo_mm.config.training import CheckpointConfig
from zppo_mm.errors import ConfigError, GradingError, RolloutServersLostError, ZppoError
from zppo_mm.interruption import RunStopped
from zppo_mm.mirror.restore import restore
from zppo_mm.mirror.stored import complete_steps
from zppo_mm.mirror.upload import Mirror
from zppo_mm.parallel import groups as parallel
from zppo_mm.run_folder import RunFolder
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.training.checkpoint_files import step_folders, step_of

logger = logging.getLogger(__name__)

_ENDS_WITH_CHECKPOINT = (RunStopped, TeacherLostError, GradingError, RolloutServersLostError)
"""Raised on every rank, so that all can wait together."""


def address_of(config: CheckpointConfig, folder: RunFolder) -> str:
    """Return where the copy of a run's folder is."""
    return f"{config.mirror.rstrip('/')}/{folder.path.name}"


def refuse_stored_run(config: CheckpointConfig, folder: RunFolder, restart: bool) -> None:
    """Refuse to begin with the first step where the copy has an earlier run; one process calls it.

    Raises:
        ConfigError: There is one.
        DataError: The store does not answer.
    """
    if not config.mirror or (config.resume and not restart):
        return
    address = address_of(config, folder)
    if steps := complete_steps(folder, RemoteObjects().tree(address)):
        asked = "--restart" if restart else "checkpoint.resume=false"
        raise ConfigError(
            f"checkpoint.mirror: {address} has an earlier run, got {asked} and checkpoints of "
            f"steps {steps}, expected none; remove it, or give another name"
        )


@contextmanager
def mirrored(
    config: CheckpointConfig, folder: RunFolder, objects: RemoteObjects | None = None
) -> Iterator[Mirror | None]:
    """Bring back what the copy has and the folder has not, then keep the copy up to date in the
    block; every rank enters it.

    Args:
        config: Has the address.
        folder: Of the run, claimed.
        objects: Speaks to the store.

    Yields:
        What keeps the copy, on rank 0 of a run that has one.

    Raises:
        CheckpointError: There are checkpoints there, none here, and none can be used.
        DataError: At the start, if the store does not answer.
        ZppoError: On every rank, if the run came to its end and the copy did not.
    """
    if not config.mirror:
        yield None
        return
    made: list[Mirror] = []
    parallel.on_rank_zero(lambda: made.append(_open(config, folder, objects or RemoteObjects())))
    mirror = made[0] if made else None
    try:
        yield mirror
    except _ENDS_WITH_CHECKPOINT:
        if problem := _finish(mirror):
            logger.warning("mirror: %s; the next start tries again", problem)
        raise
    if problem := _finish(mirror):
        raise ZppoError(
            f"checkpoint.mirror: {problem}, expected a complete copy; the run itself is complete, "
            "start the same command to try again"
        )


def _open(config: CheckpointConfig, folder: RunFolder, objects: RemoteObjects) -> Mirror:
    address = address_of(config, folder)
    stored = objects.tree(address)
    restore(folder, address, stored, objects)
    mirror = Mirror(folder, address, config.keep, objects)
    mirror.begin(stored, max(map(step_of, step_folders(folder.checkpoints)), default=0))
    return mirror


def _finish(mirror: Mirror | None) -> str:
    return parallel.on_rank_zero(lambda: mirror.finish() if mirror is not None else "")

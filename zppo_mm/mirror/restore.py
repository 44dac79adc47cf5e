"""Brings a run back from an object store into a folder that has less of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.atomic_files import replace_folder
from data.remote_objects import RemoteFile, RemoteObjects
from zppo_mm.errors import CheckpointError
from zppo_mm.mirror.stored import NUM_TRANSFERS, complete_steps, name_of_step
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint_files import (
    STATE_FILE,
    folder_of_step,
    make_empty,
    step_folders,
    step_of,
)
from zppo_mm.training.manifest import DamagedCheckpointError, check_file, read_manifest

logger = logging.getLogger(__name__)


def restore(
    folder: RunFolder, address: str, stored: Mapping[str, RemoteFile], objects: RemoteObjects
) -> int | None:
    """Fetch the newest usable checkpoint, if the folder has none as new, and the records beside it.

    A checkpoint that is not what its manifest says is named in a warning, and the one before it is
    tried.

    Args:
        folder: Of the run.
        address: Of the copy.
        stored: What is there, by path.
        objects: Speaks to the store.

    Returns:
        Its step, `None` if nothing was to be fetched.

    Raises:
        CheckpointError: There are checkpoints, here none, and there none that can be used.
        DataError: The store does not answer.
    """
    local = max(map(step_of, step_folders(folder.checkpoints)), default=-1)
    problem: DamagedCheckpointError | None = None
    for step in reversed(complete_steps(folder, stored)):
        if step <= local:
            return None
        try:
            partial = _fetch_checkpoint(folder, step, address, stored, objects)
        except DamagedCheckpointError as error:
            problem = problem or error
            logger.warning("mirror: %s cannot be used: %s", name_of_step(folder, step), error)
            continue
        # The checkpoint counts last: without it, the next start fetches the records again.
        _fetch_records(folder, address, stored, objects)
        replace_folder(partial, folder_of_step(folder.checkpoints, step))
        logger.info("mirror: step %d is fetched from %s", step, address)
        return step
    if problem is not None and local < 0:
        raise CheckpointError(
            f"checkpoint.mirror: no usable checkpoint in {address}, got {problem}, expected one "
            "that is complete; restore one from a copy, or remove them to start again"
        )
    return None


def _fetch_checkpoint(
    folder: RunFolder,
    step: int,
    address: str,
    stored: Mapping[str, RemoteFile],
    objects: RemoteObjects,
) -> Path:
    """Return an unfinished folder with the checkpoint of a step, checked."""
    target = folder_of_step(folder.checkpoints, step)
    partial = target.with_name(f".{target.name}.partial")
    make_empty(partial)
    below = f"{name_of_step(folder, step)}/"
    names = [name for name in stored if name.startswith(below)]
    _fetch(((f"{address}/{name}", partial / name.removeprefix(below)) for name in names), objects)
    for name, listed in read_manifest(partial, STATE_FILE).items():
        check_file(partial, name, listed)
    return partial


def _fetch_records(
    folder: RunFolder, address: str, stored: Mapping[str, RemoteFile], objects: RemoteObjects
) -> None:
    tops = {str(path.relative_to(folder.path)) for path in folder.restored}
    wanted = [
        name
        for name, file in stored.items()
        if name.partition("/")[0] in tops and not _is_here(folder.path / name, file)
    ]
    _fetch(((f"{address}/{name}", folder.path / name) for name in wanted), objects)
    log = str(folder.log.relative_to(folder.path))
    if log in stored:
        earlier = folder.path / f".{log}.fetched"
        objects.download(f"{address}/{log}", earlier)
        _put_before(earlier.read_bytes(), folder.log)
        earlier.unlink()


def _is_here(path: Path, file: RemoteFile) -> bool:
    # Files of a step do not change once they are written.
    is_of_step = path.name.startswith("step_")
    return is_of_step and path.is_file() and path.stat().st_size == file.size


def _fetch(files: Iterable[tuple[str, Path]], objects: RemoteObjects) -> None:
    def fetch(file: tuple[str, Path]) -> None:
        address, path = file
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.fetched")
        objects.download(address, temporary)
        os.replace(temporary, path)

    with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
        try:
            for _ in pool.map(fetch, files):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _put_before(earlier: bytes, log: Path) -> None:
    """Put the log of an earlier machine before what this run has logged so far. The file stays the
    same one, since the run has it open.
    """
    own = log.read_bytes() if log.exists() else b""
    if own.startswith(earlier):
        return
    with open(log, "r+b" if log.exists() else "wb") as file:
        file.write(earlier + own)

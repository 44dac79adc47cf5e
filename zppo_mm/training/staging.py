"""A rank's file of a checkpoint on a disk of its machine, until shared storage has taken it.

The file has no name there: it is gone with the process, whatever ends it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from zppo_mm.errors import CheckpointError
from zppo_mm.weights.distributed_folder import WrittenFile, write_chunks, write_to
from zppo_mm.weights.tensor_shards import WriteChunk

_COPY_BYTES = 1 << 24


def stage(chunks: list[WriteChunk], folder: Path | None) -> Callable[[Path], WrittenFile]:
    """Give up the memory of what is to be written, if there is a folder to write it to first.

    Args:
        chunks: From `plan_writes`; empty when they are written.
        folder: Of this machine; `None` keeps them in memory.

    Returns:
        Writes this rank's file to a folder, syncs it, and may be called once.

    Raises:
        CheckpointError: The folder has no room or cannot be written.
    """
    if folder is None:
        return partial(write_chunks, chunks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = cast(BinaryIO, TemporaryFile(dir=folder))  # noqa: SIM115, `_move` closes it
        return partial(_move, stream, write_to(stream, chunks))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.staging_dir: {folder} cannot take a checkpoint, got {error}, expected a "
            "folder of this machine with room for this machine's part of two; give another one, or "
            "leave the key empty"
        ) from error


def _move(stream: BinaryIO, written: WrittenFile, folder: Path) -> WrittenFile:
    with stream, open(folder / written.name, "wb") as target:
        stream.seek(0)
        shutil.copyfileobj(stream, target, _COPY_BYTES)
        target.flush()
        os.fsync(target.fileno())
    return written

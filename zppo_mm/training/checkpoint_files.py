"""The folders of a run's checkpoints: which of them are complete, and how one is published."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from data.atomic_files import remove, replace_folder, restore_replaced, sync
from zppo_mm.errors import CheckpointError
from zppo_mm.training.manifest import MANIFEST_FILE, checksum

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
SCHEDULE_FILE = "schedule.json"
RANDOM_FILE = "random.pt"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


def folder_of_step(folder: Path, step: int) -> Path:
    """Return where the checkpoint after a step is, among those of a run."""
    return folder / f"step_{step:06d}"


def step_folders(folder: Path) -> list[Path]:
    """Return the completed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [
        path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def make_empty(partial_folder: Path) -> None:
    """Make the folder to write to, without what an earlier process left unfinished."""
    for leftover in partial_folder.parent.glob(".step_*.partial"):
        remove(leftover)
    partial_folder.mkdir(parents=True)


def publish(
    partial_folder: Path,
    target: Path,
    checksums: dict[str, int],
    keep: int,
    in_use: Callable[[], Path | None] = lambda: None,
) -> None:
    """Rename a complete folder, then prune what is older; the rename is the moment at which the
    checkpoint exists.

    Args:
        partial_folder: With all files of the checkpoint.
        target: Its final name, beside the other checkpoints.
        checksums: Of the files that are synced to disk already, by name.
        keep: Complete checkpoints left afterwards, at least 1.
        in_use: Returns one that must stay for now, besides.

    Raises:
        OSError: There is no room or no permission; the other checkpoints are as they were.
    """
    listed = {}
    for path in sorted(partial_folder.iterdir()):
        if path.name not in checksums:
            sync(path)
        known = checksums.get(path.name)
        listed[path.name] = {
            "size": path.stat().st_size,
            "crc32": checksum(path) if known is None else known,
        }
    (partial_folder / MANIFEST_FILE).write_text(json.dumps(listed, indent=1), encoding="utf-8")
    sync(partial_folder / MANIFEST_FILE)
    sync(partial_folder)
    replace_folder(partial_folder, target)
    _prune(target, keep, in_use)


def _prune(newest: Path, keep: int, in_use: Callable[[], Path | None]) -> None:
    """Remove the oldest beyond `keep`; what cannot be removed now is tried again after the next
    save.
    """
    # Only what is older than a checkpoint that has just been read back: others may be damaged.
    older = [path for path in step_folders(newest.parent) if step_of(path) < step_of(newest)]
    try:
        for old in older[: max(0, len(older) - (keep - 1))]:
            # Renamed first, so that a half-removed folder never looks like a checkpoint.
            if old != in_use():
                replace_folder(old, old.with_name(f".{old.name}.removed"))
        for leftover in newest.parent.glob(".step_*.*"):
            remove(leftover)
    except OSError as error:
        logger.warning("checkpoint: an old one cannot be removed now, got %s", error)


def put_back(folder: Path) -> None:
    """Undo a replacement that a kill cut in two: the earlier checkpoint of that name is complete.

    Raises:
        CheckpointError: Something else has the name of the checkpoints' folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no folder, got "
            f"{'a link without a target' if folder.is_symlink() else 'a file'}, expected the "
            "run's checkpoints; bring back the disk that they are on, or remove it to start again"
        )
    restore_replaced(folder, "step_*")

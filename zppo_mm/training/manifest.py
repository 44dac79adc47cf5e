"""The list of a checkpoint's files, which distinguishes damage from a disk that cannot be read
right now.
"""

from __future__ import annotations

import json
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zppo_mm.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
_READ_BYTES = 1 << 24


class DamagedCheckpointError(CheckpointError):
    """What the disk holds is not what was written."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What a file of a checkpoint must be: its bytes and its checksum."""

    size: int
    crc32: int


def read_manifest(folder: Path, required: str) -> dict[str, Listed]:
    """Return what a checkpoint's files must be, by name.

    Args:
        folder: The checkpoint.
        required: A file that every checkpoint has.

    Raises:
        DamagedCheckpointError: There is no manifest, or it is not one.
        OSError: It cannot be read now.
    """
    path = folder / MANIFEST_FILE
    if _size(path) is None:
        raise DamagedCheckpointError(
            f"{path}: the file is missing, expected the list of files; use another checkpoint"
        )
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _no_manifest(path, f"no JSON ({type(error).__name__})") from error
    if not isinstance(raw, dict):
        raise _no_manifest(path, f"JSON of type {type(raw).__name__}")
    listed = {name: _entry(path, name, entry) for name, entry in raw.items()}
    if required not in listed:
        raise _no_manifest(path, f"{len(listed)} files without {required}")
    return listed


def check_file(folder: Path, name: str, expected: Listed) -> None:
    """Compare a file with what it must be.

    Raises:
        DamagedCheckpointError: It is missing, or another one.
        OSError: It cannot be read now.
    """
    file = folder / name
    size = _size(file)
    if size is None or size != expected.size:
        got = "no file" if size is None else f"{size} bytes"
        raise DamagedCheckpointError(
            f"{file}: the checkpoint is incomplete, got {got}, expected {expected.size} bytes; use "
            "another checkpoint"
        )
    if checksum(file) != expected.crc32:
        raise DamagedCheckpointError(
            f"{file}: the file is damaged, got another checksum, expected {expected.crc32}; use "
            "another checkpoint"
        )


def _size(path: Path) -> int | None:
    """Return the bytes of a plain file, `None` if there is none; a pipe of that name would keep its
    reader waiting forever.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def _entry(path: Path, name: str, entry: Any) -> Listed:
    # No name may lead out of the folder.
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise _no_manifest(path, f"the name {name!r}")
    size, crc32 = (
        (entry.get("size"), entry.get("crc32")) if isinstance(entry, dict) else (None, None)
    )
    if type(size) is not int or type(crc32) is not int:
        raise _no_manifest(path, f"an entry of {name!r} without size and checksum")
    return Listed(size, crc32)


def _no_manifest(path: Path, got: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path}: the manifest is damaged, got {got}, expected size and crc32 of every file by its "
        "name; use another checkpoint"
    )

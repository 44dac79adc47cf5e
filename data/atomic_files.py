"""Files and folders that appear under their name complete or not at all.

Everything is written beside its target under a hidden temporary name, synced, and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REPLACED = ".replaced"


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file, or replace it; a reader sees the old content or the new.

    Args:
        path: Its folder is made if needed.
        content: Text is written as UTF-8, without translating line ends.

    Returns:
        The path.

    Raises:
        OSError: There is no room or no permission; an earlier file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several ranks may write the same file: each needs a temporary name of its own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `target` at the end of the block.

    Args:
        target: Where the folder will be.
        replace: Whether it takes the place of a folder of that name. If not, and another process
            has made `target` meanwhile, that one stays.

    Raises:
        OSError: There is no room or no permission; `target` is as it was.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace:
            replace_folder(temporary, target)
        else:
            _rename_unless_made(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder over whatever has its name; what `target` named is removed last.

    A folder cannot be renamed over another. A kill between the two renames leaves the old one as
    `.NAME.replaced`, which `restore_replaced` puts back.
    """
    replaced = target.with_name(f".{target.name}{_REPLACED}")
    if os.path.lexists(target):
        remove(replaced)
        target.rename(replaced)
    source.rename(target)
    sync(target.parent)
    remove(replaced)


def restore_replaced(folder: Path, pattern: str) -> None:
    """Undo the replacements in `folder` that a kill cut in two.

    Args:
        folder: Holds the targets.
        pattern: A glob of the targets' names.
    """
    for replaced in folder.glob(f".{pattern}{_REPLACED}"):
        target = replaced.with_name(replaced.name.removeprefix(".").removesuffix(_REPLACED))
        if not target.exists():
            replaced.rename(target)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it is there; of a link the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget_cached(path: Path) -> None:
    """Let the next reader of a synced file read the disk and not memory, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _rename_unless_made(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        # Another process was faster.
        if not target.exists():
            raise

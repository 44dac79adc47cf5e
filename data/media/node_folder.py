"""A folder in the memory of a machine that the processes of a run share, gone when the last of them
is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from data.file_lock import locked, unlock_and_close

SHARED_MEMORY = Path("/dev/shm")
LOCK = "lock"
ALIVE = "alive"
"""Every process that uses a folder holds a shared lock on this file of it. The kernel gives the
lock back however a process ends.
"""


def default_root() -> Path:
    """Return the machine's shared memory, or where it has none its folder for temporary files."""
    if os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


class NodeFolder:
    """The folder of one run.

    Args:
        root: Where the folders of all runs of this user lie, in one of its own.
        name: Of the run; its processes on this machine give the same.

    Attributes:
        path: The folder.

    Raises:
        OSError: It cannot be made, or another user's lies there.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._base = root / f"zppo_mm-{os.getuid()}"
        self._base.mkdir(mode=0o700, exist_ok=True)
        status = self._base.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(
                f"{self._base}: not a folder of this user alone, got mode {status.st_mode:o} of "
                f"user {status.st_uid}; remove it"
            )
        self.path = self._base / name
        with locked(self._base / LOCK):
            for other in self._base.iterdir():
                if other.is_dir():
                    _remove_if_dead(other)
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._alive: int | None = os.open(self.path / ALIVE, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._alive, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let go of the folder; the last process removes it."""
        if self._alive is None:
            return
        alive, self._alive = self._alive, None
        with contextlib.ExitStack() as held:
            # Where somebody removed the folders of all runs there is nothing to lock or remove.
            with contextlib.suppress(FileNotFoundError):
                held.enter_context(locked(self._base / LOCK))
            unlock_and_close(alive)
            _remove_if_dead(self.path)


def _remove_if_dead(folder: Path) -> None:
    """Remove the folder of a run that has no process here any more."""
    try:
        descriptor = os.open(folder / ALIVE, os.O_RDWR)
    except FileNotFoundError:  # it ended while it made or removed the folder
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        unlock_and_close(descriptor)

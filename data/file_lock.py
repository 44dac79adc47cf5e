"""Locks of files, which the kernel gives back however a process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the exclusive lock of a file, which is made if it is missing; yields its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        wait_for_lock(descriptor)
        yield descriptor
    finally:
        unlock_and_close(descriptor)


def wait_for_lock(descriptor: int) -> None:
    """Wait until no other process or thread has the lock of an open file, however long it works."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def unlock_and_close(descriptor: int) -> None:
    """Give a lock back; closing alone would leave it to processes that were forked meanwhile."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)

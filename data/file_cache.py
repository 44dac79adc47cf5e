"""Files that were fetched from elsewhere, on a disk of this machine: each once for all processes,
up to a number of bytes.

Every file has its final name or none: it is fetched under another, beside it. Its time of
modification stands for its version. Who reads a file holds a shared lock on it, so it stays; the
others make way for new ones, the least recently read first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.file_lock import locked, unlock_and_close, wait_for_lock

PART = ".part"
LOCKS, TOTAL = ".locks", ".total"
NUM_LOCKS = 64
"""Files that share a lock are fetched one after the other."""
WAIT_SECONDS = 0.1
MAX_WAITS = 50
"""How often room is looked for; files are in use for the time of a read, or as long as a run."""
ATIME_SECONDS = 10
"""How exact the time of the last reading is."""


class NoRoomError(Exception):
    """So much is in use that a file does not fit."""


class FileCache:
    """Fetched files below a folder. Safe to use from several threads and processes.

    Args:
        root: The folder, made at the first use.
        max_bytes: Most bytes of all files.

    Attributes:
        counts: Of this process: `evicted` (files that made way).
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        self.counts: Counter[str] = Counter()

    def open(self, path: Path, size: int, stamp: int, fetch: Callable[[Path], None]) -> int:
        """Return a descriptor of a file, for `unlock_and_close`; fetch it if it is not there.

        Args:
            path: Below the root.
            size: Of the file, in bytes.
            stamp: Stands for its version, in seconds.
            fetch: Writes the file, of this size, to the path that it is given.

        Raises:
            NoRoomError: It does not fit beside what is in use.
            OSError: The disk is full or not to be written.
        """
        found = _opened(path, size, stamp)
        if found is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._claimed(path):
            found = _opened(path, size, stamp)  # another process may have fetched it meanwhile
            return self._fetch(path, size, stamp, fetch) if found is None else found

    def remove(self, path: Path) -> bool:
        """Remove a file unless it is in use; returns whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            unlock_and_close(descriptor)
        return True

    def _fetch(self, path: Path, size: int, stamp: int, fetch: Callable[[Path], None]) -> int:
        self._reserve(path, size)
        part = path.with_name(f".{path.name}.{size}{PART}")
        try:
            fetch(part)
            descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            # Before it has its name, so that it does not make way at once.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor, (time.time(), stamp))
            replaced = path.stat().st_size if path.exists() else 0
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            self._add(-size)
            raise
        self._add(-replaced)
        return descriptor

    def _reserve(self, path: Path, size: int) -> None:
        """Have room for a file, after others have made way if need be."""
        for _ in range(MAX_WAITS):
            with self._total() as lock:
                total = _read_number(lock)
                if total + size > self.max_bytes:
                    total = self._make_room(size)
                fits = total + size <= self.max_bytes
                _write_number(lock, total + size * fits)
            if fits:
                return
            if size > self.max_bytes:
                break
            time.sleep(WAIT_SECONDS)
        raise NoRoomError(
            f"got {size} bytes for {path} beside {total} in use, expected at most "
            f"{self.max_bytes} in {self.root}"
        )

    def _add(self, num_bytes: int) -> None:
        with self._total() as lock:
            _write_number(lock, max(0, _read_number(lock) + num_bytes))

    def _make_room(self, size: int) -> int:
        """Remove the least recently read files until another fits; returns the bytes of the rest.

        They are counted again: the number that is kept does not know what was killed while it
        fetched.
        """
        found = sorted(self._files())
        total = sum(num_bytes for _, num_bytes, _ in found)
        for _, num_bytes, path in found:
            if total + size <= self.max_bytes:
                break
            if not path.name.endswith(PART) and self.remove(path):
                total -= num_bytes
                self.counts["evicted"] += 1
        return total

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the time of the last reading, size and path of every file."""
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name != LOCKS]
            for path in (Path(folder, name) for name in names if name != TOTAL):
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                if not path.name.endswith(PART):
                    yield status.st_atime, status.st_size, path
                elif not self._removed_if_dead(path):
                    yield status.st_atime, int(path.name.split(".")[-2]), path

    def _removed_if_dead(self, part: Path) -> bool:
        """Remove what a process was fetching when it ended; returns whether it was so."""
        target = part.with_name(part.name[1:].removesuffix(PART).rpartition(".")[0])
        try:
            with self._claimed(target, wait=False):
                part.unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False

    def lock_of(self, path: Path) -> Path:
        """Return the file whose lock is held while a file is fetched."""
        digest = hashlib.blake2b(str(path).encode(), digest_size=2).digest()
        return self.root / LOCKS / str(int.from_bytes(digest, "big") % NUM_LOCKS)

    @contextmanager
    def _claimed(self, path: Path, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock of a file that is fetched.

        Raises:
            BlockingIOError: Another process has it, and is not waited for.
        """
        lock = self.lock_of(path)
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if wait:
                wait_for_lock(descriptor)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            unlock_and_close(descriptor)

    @contextmanager
    def _total(self) -> Iterator[int]:
        with locked(self.root / TOTAL) as lock:
            yield lock


def _opened(path: Path, size: int, stamp: int) -> int | None:
    """Open a file, which stays as long as it is open; `None` if it is missing or another one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = os.fstat(descriptor)
        is_it = (
            found.st_size == size and int(found.st_mtime) == stamp and stat.S_ISREG(found.st_mode)
        )
        if is_it and found.st_nlink:
            if time.time() - found.st_atime > ATIME_SECONDS:
                os.utime(descriptor, (time.time(), stamp))
            return descriptor
    except BaseException:
        unlock_and_close(descriptor)
        raise
    unlock_and_close(descriptor)
    return None


def _read_number(descriptor: int) -> int:
    return int(os.pread(descriptor, 32, 0) or b"0")


def _write_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, b"%31d" % number, 0)

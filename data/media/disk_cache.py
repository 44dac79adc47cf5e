"""Arrays by key on a local disk, kept over runs up to a number of bytes, for all processes of a
machine.

A process that finds nothing under a key claims it by the lock of a file, makes the array, and gives
the file its name. The kernel frees the lock of a process that is killed. Nothing here ends a run:
what cannot be kept, or was damaged, is made again and counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.file_lock import unlock_and_close
from data.media import array_file
from data.media.array_file import DamagedFileError, Stored
from data.media.node_folder import LOCK

logger = logging.getLogger(__name__)

ENDING = ".array"
"""Of the files of the cache: others in its folder are left alone."""
PART = f"{ENDING}.part"
ROOM_FRACTION = 0.9
"""How full the cache is after it was cleared for something new, so that this is not done each
time."""
FREE_FRACTION = 0.05
"""Of the disk, which is left to others however much the cache may take."""
STALE_SECONDS = 7 * 24 * 3600.0
"""What nobody asked for so long makes way first."""
REFUSALS_PER_LOOK = 256
"""How often a key without room is refused before the folder is looked through again."""
POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the cache, or one that is to be; `asked` is when somebody last asked for it."""

    name: str
    num_bytes: int
    asked: float

    @property
    def is_part(self) -> bool:
        return self.name.endswith(PART)


class DiskCache:
    """Arrays that are kept on a disk. Safe to use from several threads and processes.

    Args:
        folder: Where, on a disk of this machine; made if needed.
        max_bytes: Most bytes of all files.
        wait_seconds: Longest wait for another process that makes the same, which may have been
            stopped; then this one makes it for itself.

    Attributes:
        counts: So far, of this process: `hits`, `misses` (made here), `not_kept` (of these without
            room, or by a fault of the disk), `damaged` (files that are not as they were written,
            made again), `evictions` (files removed for others).

    Raises:
        OSError: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, max_bytes: int, wait_seconds: float) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600))
        self._folder = folder
        self.max_bytes = max_bytes
        self._wait_seconds = wait_seconds
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._has_warned = False
        self._refused_from: str | None = None
        self._refusals = 0

    def get(self, key: str, make: Callable[[], Stored]) -> Stored:
        """Return what is kept under a key. If nothing is, make and keep it, or wait for who does.

        Args:
            key: A name for a file, spread evenly: a digest.
            make: Returns header and array.

        Raises:
            Exception: What `make` raises; nothing is kept then.
        """
        found = self._find(key)
        if found is None:
            with self._claimed(key) as part:
                # Another process may have finished it while this one waited.
                found = self._find(key)
                if found is None:
                    stored = make()
                    self._count("misses")
                    if part is None or not self._keep(part, key, stored):
                        self._count("not_kept")
                    return stored
        self._count("hits")
        return found

    def num_bytes(self) -> int:
        """Return the bytes of all files, by the count that the processes keep."""
        try:
            return int((self._folder / LOCK).read_bytes() or b"0")
        except (OSError, ValueError):  # somebody removed the folder or wrote there
            return 0

    def _count(self, name: str, number: int = 1) -> None:
        with self._counting:
            self.counts[name] += number

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{ENDING}"

    def _part(self, key: str) -> Path:
        return self._folder / f"{key}{PART}"

    def _find(self, key: str) -> Stored | None:
        """Read a finished file; a damaged one is removed, to be made again."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            found = _unsealed(array_file.read(descriptor, map_large=False))
            with contextlib.suppress(OSError):  # another user's
                os.utime(descriptor)
            return found
        # Any bytes may lie there: a number of another type, a shape below zero.
        except (ValueError, TypeError, OverflowError, OSError) as error:
            self._count("damaged")
            logger.warning("%s is made again: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        finally:
            os.close(descriptor)

    @contextmanager
    def _claimed(self, key: str) -> Iterator[int | None]:
        """Hold the lock of the file that is to become that of a key; yields its descriptor, `None`
        if there can be no such file or another process has had it for too long.
        """
        path = self._part(key)
        try:
            descriptor = self._locked(path)
        except OSError as error:
            self._warn(error)
            descriptor = None
        if descriptor is None:
            yield None
            return
        try:
            yield descriptor
        finally:
            with contextlib.suppress(OSError):
                if _is_named(descriptor, path):
                    path.unlink()
            unlock_and_close(descriptor)

    def _locked(self, path: Path) -> int | None:
        """Return the descriptor of a file, made if needed, with its lock; `None` if another holds
        the lock for too long.
        """
        deadline = time.monotonic() + self._wait_seconds
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            is_locked = _try_lock(descriptor)
            while not is_locked and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                is_locked = _try_lock(descriptor)
            if is_locked and _is_named(descriptor, path):
                return descriptor
            # Its holder has given it another name, or removed it.
            unlock_and_close(descriptor)
            if not is_locked:
                return None

    def _keep(self, part: int, key: str, stored: Stored) -> bool:
        """Write a claimed file and give it its name; returns whether there was room."""
        sealed = _sealed(stored)
        try:
            if not self._reserve(part, key, array_file.file_size(*sealed)):
                return False
            array_file.write(part, *sealed)
            os.rename(self._part(key), self._path(key))
        except OSError as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: OSError) -> None:
        """Say once why something cannot be kept; `counts` says how often."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: cannot keep what was made, got %s, expected a folder of a local disk with "
                "room; clear it or name another one",
                self._folder,
                error,
            )

    def _reserve(self, part: int, key: str, size: int) -> bool:
        """Give a file its size, after others have made way if need be; returns whether there is
        room.
        """
        lock = self._locked(self._folder / LOCK)
        if lock is None:
            return False
        try:
            total = self._total(lock)
            if total + size > self.max_bytes:
                if self._is_refused_unseen(key):
                    return False
                total, has_room = self._clear(_File(f"{key}{ENDING}", size, time.time()))
                _write_number(lock, total)
                if not has_room:
                    self._refused_from = min(key, self._refused_from or key)
                    return False
                self._refused_from = None
            self._check_free(size)
            _write_number(lock, total + size)
            os.ftruncate(part, 0)  # it may be what a killed process has begun
            os.ftruncate(part, size)
        finally:
            unlock_and_close(lock)
        return True

    def _check_free(self, size: int) -> None:
        """Leave a part of the disk to others.

        Raises:
            OSError: There would be less.
        """
        state = os.statvfs(self._folder)
        free = state.f_bavail * state.f_frsize - size
        if free < FREE_FRACTION * state.f_blocks * state.f_frsize:
            raise OSError(f"less than {FREE_FRACTION:.0%} of the disk free")

    def _total(self, lock: int) -> int:
        """Return the counted bytes of all files, counted again where that was lost."""
        try:
            return int(os.pread(lock, 32, 0))
        except ValueError:
            return sum(file.num_bytes for file in self._files())

    def _is_refused_unseen(self, key: str) -> bool:
        """Return whether a key would not be kept, as another before it was not: only from time to
        time is it worth looking through the folder for what has become stale meanwhile.
        """
        if self._refused_from is None or key < self._refused_from:
            return False
        self._refusals += 1
        return self._refusals % REFUSALS_PER_LOOK != 0

    def _clear(self, new: _File) -> tuple[int, bool]:
        """Remove files for a new one; returns the bytes of those that are left, and whether the new
        one has room.

        What is not stale goes by name, the new file included. Who sees a set of clips epoch by
        epoch, each time in another order, then finds the part of it that fits. Who removes what was
        used least lately finds f + (1 - f) ln(1 - f) of it where the fraction f fits: 15 % if half
        of it does.
        """
        files = [*self._files(), new]
        files.sort(key=lambda file: file.name, reverse=True)
        stale = new.asked - STALE_SECONDS
        files.sort(key=lambda file: (file.is_part, file.asked if file.asked < stale else new.asked))
        before = files.index(new)
        has_room = sum(file.num_bytes for file in files[before:]) <= self.max_bytes
        total = sum(file.num_bytes for file in files)
        enough = self.max_bytes
        if not has_room:  # they can be too many without it if the limit was lowered
            total -= files.pop(before).num_bytes
        elif total > self.max_bytes:
            enough = int(ROOM_FRACTION * self.max_bytes)
        for file in files[:before] if has_room else files:
            if total <= enough or file.is_part:
                break
            with contextlib.suppress(FileNotFoundError):
                (self._folder / file.name).unlink()
            self._count("evictions")
            total -= file.num_bytes
        return total - new.num_bytes * has_room, has_room

    def _files(self) -> Iterator[_File]:
        """List all files; those that a killed process left unfinished are removed."""
        for entry in os.scandir(self._folder):
            if not entry.name.endswith((ENDING, PART)):
                continue
            if entry.name.endswith(PART) and _remove_if_dead(Path(entry.path)):
                continue
            with contextlib.suppress(FileNotFoundError):  # removed at this moment
                status = entry.stat()
                yield _File(entry.name, status.st_size, status.st_mtime)


def _sealed(stored: Stored) -> Stored:
    """Return what is written: with a checksum, which a disk's content needs."""
    header, array = stored
    array = np.ascontiguousarray(array)
    return {"crc32": _checksum(header, array), "header": dict(header)}, array


def _unsealed(sealed: Stored) -> Stored:
    """Return what was sealed.

    Raises:
        DamagedFileError: It is something else now.
    """
    outer, array = sealed
    header, expected = outer.get("header"), outer.get("crc32")
    got = _checksum(header, array)
    if not isinstance(header, dict) or got != expected:
        raise DamagedFileError(
            f"array file: damaged, got the checksum {got}, expected {expected}; check the disk"
        )
    return header, array


def _checksum(header: object, array: npt.NDArray[Any]) -> int:
    described = json.dumps([header, array.dtype.str, array.shape]).encode()
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, zlib.crc32(described))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Return whether a file still has a name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_dead(path: Path) -> bool:
    """Remove a file that nobody holds the lock of; returns whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(descriptor):
            return False
        if _is_named(descriptor, path):
            path.unlink()
        return True
    finally:
        unlock_and_close(descriptor)


def _write_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, b"%31d" % number, 0)

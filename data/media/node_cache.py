"""What the processes of one machine make once and all find: arrays by key, up to a number of bytes.

A process that finds nothing under a key claims it by the lock of a file, makes the array, and gives
the file its name; who asked meanwhile waits for the lock. The kernel frees the lock of a process
that is killed, and the next one takes over.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.errors import ReasonedError
from data.file_lock import locked, unlock_and_close, wait_for_lock
from data.media import array_file
from data.media.array_file import DamagedFileError, Stored
from data.media.node_folder import ALIVE, LOCK, NodeFolder, default_root

logger = logging.getLogger(__name__)

PART = ".part"
FREE_FRACTION = 0.5
"""Of the free shared memory, which others need as well: NCCL, for one."""
ROOM_FRACTION = 0.9
"""How full the cache is after it was cleared for something new, so that this is not done each
time."""

Make = Callable[[], Stored]


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the cache; `step` is the last that asked for it."""

    name: str
    num_bytes: int
    step: float


class NodeCache:
    """Arrays that the processes of one machine share. Safe to use from several threads.

    Where the machine has no room or the folder was removed, each process makes what it needs.

    Args:
        name: Of the run; its processes on this machine give the same.
        max_bytes: Most bytes of all arrays, further limited to a part of the memory that is free.
        root: Where the folder is made; by default in the machine's shared memory.

    Attributes:
        counts: So far, of this process: `opened` (made here), `prefetched` (of these ahead of
            time), `found` (made earlier, or by another process), `not_kept` (made, without room),
            `damaged` (files that something else changed; what was in them is made again).

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self, name: str, max_bytes: int, root: Path | None = None) -> None:
        self._folder = NodeFolder(root or default_root(), name)
        state = os.statvfs(self._folder.path)
        self.max_bytes = min(max_bytes, int(FREE_FRACTION * state.f_bavail * state.f_frsize))
        if self.max_bytes < max_bytes:
            logger.info(
                "opened media may take %d bytes in %s, got data.media_cache_bytes=%d: no more than "
                "half of what is free is taken",
                self.max_bytes,
                self._folder.path,
                max_bytes,
            )
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._has_warned = False
        self._step = 1

    def get(self, key: str, make: Make) -> Stored:
        """Return what is kept under a key. If nothing is, make and keep it, or wait for who does.

        Args:
            key: A name for a file.
            make: Returns header and array.

        Raises:
            ReasonedError: What `make` raises, also in another process that made it meanwhile.
        """
        while True:
            found = self._find(key)
            if found is not None:
                self._count("found")
                return found
            with self._claimed(key) as part:
                if part is None:
                    return self._make_unkept(make)
                state, header = array_file.read_state(part)
                if state == "complete":
                    found = self._read(part, key)
                    if found is not None:
                        self._count("found")
                        return found
                    self._part(key).unlink(missing_ok=True)
                    continue
                if state == "refused":
                    raise ReasonedError(header["reason"], header["message"])
                if state == "not kept":
                    return self._make_unkept(make)
                if self._is_claim(part, key):
                    return self._make(part, key, make)

    def prefetch(self, key: str, make: Make) -> bool:
        """Make what the next step will ask for, unless it is there or being made. A failure leaves
        no trace; nothing that this step needs makes way.

        Returns:
            Whether there was room.
        """
        with self._finished(key) as descriptor:
            if descriptor is not None:
                self._asked(descriptor, self._step + 1)
                return True
        with self._claimed(key, wait=False) as part:
            if part is None or not self._is_claim(part, key):
                return True
            is_kept = False
            try:
                stored = make()
                self._count("opened")
                is_kept = self._keep(part, key, stored, ahead=True)
            finally:
                if not is_kept:
                    self._part(key).unlink(missing_ok=True)
            self._count("prefetched" if is_kept else "not_kept")
            return is_kept

    def next_step(self) -> None:
        """Let what this step did not ask for make way first from now on."""
        self._step += 1

    def num_bytes(self) -> int:
        """Return the bytes of everything that is kept on this machine."""
        try:
            with locked(self._folder.path / LOCK) as lock:
                return _read_number(lock)
        except OSError:  # somebody removed the folder
            return 0

    def close(self) -> None:
        """Leave; the last process on this machine removes everything."""
        self._folder.close()

    def _count(self, name: str) -> None:
        with self._counting:
            self.counts[name] += 1

    def _part(self, key: str) -> Path:
        return self._folder.path / f"{key}{PART}"

    def _find(self, key: str) -> Stored | None:
        with self._finished(key) as descriptor:
            if descriptor is None:
                return None
            self._asked(descriptor, self._step)
            return self._read(descriptor, key)

    def _read(self, descriptor: int, key: str) -> Stored | None:
        """Read a finished file; a damaged one is removed, to be made again."""
        try:
            return array_file.read(descriptor)
        except DamagedFileError as error:
            self._count("damaged")
            (self._folder.path / key).unlink(missing_ok=True)
            logger.warning("an opened medium is opened again: %s", error)
            return None

    @contextmanager
    def _finished(self, key: str) -> Iterator[int | None]:
        """Open the file of a key; yields its descriptor, `None` if there is none."""
        try:
            descriptor = os.open(self._folder.path / key, os.O_RDONLY)
        except OSError:
            yield None
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _asked(self, descriptor: int, step: int) -> None:
        """Note that a step asks for a file, unless this one already does; for the processes of this
        run a file's time is a number of steps.
        """
        if os.fstat(descriptor).st_mtime < self._step:
            os.utime(descriptor, (step, step))

    @contextmanager
    def _claimed(self, key: str, *, wait: bool = True) -> Iterator[int | None]:
        """Hold the lock of the file that is to become that of a key; yields its descriptor, `None`
        if there can be no such file or others have it and are not waited for.
        """
        try:
            descriptor = os.open(self._part(key), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self._warn(error)
            yield None
            return
        try:
            try:
                if wait:
                    wait_for_lock(descriptor)
                else:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield descriptor
        finally:
            # Closing is not enough: an array that is mapped from here holds the file open.
            unlock_and_close(descriptor)

    def _is_claim(self, part: int, key: str) -> bool:
        """Return whether this process is to make what is missing, now that it holds the lock: the
        file may be one that another gave up, or a new one beside the finished one.
        """
        if os.fstat(part).st_nlink == 0 or array_file.read_state(part)[0] == "complete":
            return False
        if (self._folder.path / key).exists():
            self._part(key).unlink(missing_ok=True)
            return False
        return True

    def _make(self, part: int, key: str, make: Make) -> Stored:
        """Make and keep it; who waits for the lock learns from the file what came of it, also when
        it has lost its name.
        """
        try:
            stored = make()
        except ReasonedError as error:
            self._part(key).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # without room the others try for themselves
                array_file.mark(part, "refused", {"reason": error.reason, "message": str(error)})
            raise
        except BaseException:
            self._part(key).unlink(missing_ok=True)
            raise
        self._count("opened")
        if self._keep(part, key, stored):
            return self._read(part, key) or stored
        self._part(key).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            array_file.mark(part, "not kept", {})
        self._count("not_kept")
        return stored

    def _make_unkept(self, make: Make) -> Stored:
        stored = make()
        self._count("opened")
        self._count("not_kept")
        return stored

    def _keep(self, part: int, key: str, stored: Stored, *, ahead: bool = False) -> bool:
        """Write a claimed file and give it its name; returns whether there was room."""
        try:
            if not self._reserve(part, array_file.file_size(*stored), ahead):
                return False
            array_file.write(part, *stored)
            step = self._step + ahead
            os.utime(part, (step, step))
            os.rename(self._part(key), self._folder.path / key)
        except OSError as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: OSError) -> None:
        """Say once why something cannot be kept; `counts` says how often."""
        if self._has_warned:
            return
        self._has_warned = True
        advice = (
            "let nothing clear its folder during the run (RemoveIPC of systemd does at logout)"
            if isinstance(error, FileNotFoundError)
            else "give the machine more shared memory (docker run --shm-size) or lower "
            "data.media_cache_bytes"
        )
        logger.warning(
            "opened media cannot be kept for the other processes, got %s; %s", error, advice
        )

    def _reserve(self, part: int, size: int, ahead: bool) -> bool:
        """Give a file its size, after others have made way if need be."""
        with locked(self._folder.path / LOCK) as lock:
            total = _read_number(lock)
            if total + size > self.max_bytes:
                total = self._clear(size, ahead)
            if total + size > self.max_bytes:
                return False
            os.ftruncate(part, size)
            _write_number(lock, total + size)
        return True

    def _clear(self, size: int, ahead: bool) -> int:
        """Remove files for one of `size` bytes, those first that this step did not ask for, then
        those of the next step; returns the bytes that are left.
        """
        files = list(self._files())
        total = sum(file.num_bytes for file in files)
        may_go = [
            file
            for file in files
            if not file.name.endswith(PART) and (not ahead or file.step < self._step)
        ]
        if total + size - sum(file.num_bytes for file in may_go) > self.max_bytes:
            return total
        # Within a step by name: it asks for everything several times, and who then removes what was
        # used least lately finds nothing.
        may_go.sort(key=lambda file: (file.step == self._step, file.step, file.name))
        for file in may_go:
            if total + size <= ROOM_FRACTION * self.max_bytes:
                break
            (self._folder.path / file.name).unlink(missing_ok=True)
            total -= file.num_bytes
        return total

    def _files(self) -> Iterator[_File]:
        for entry in os.scandir(self._folder.path):
            if entry.name not in (ALIVE, LOCK):
                with contextlib.suppress(FileNotFoundError):  # given up at this moment
                    status = entry.stat()
                    yield _File(entry.name, status.st_size, status.st_mtime)


def _read_number(descriptor: int) -> int:
    return int(os.pread(descriptor, 32, 0) or b"0")


def _write_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, b"%31d" % number, 0)

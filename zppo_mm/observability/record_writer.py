"""Writes the records of a run's steps. Storage may refuse them for a while: they wait in memory, in
their order, and are tried again with every further record and before every checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.atomic_files import write_atomically
from zppo_mm.errors import ZppoError

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 1 << 30
Write = Callable[[Path, bytes], object]
"""Writes a whole file, or appends to one."""


@dataclass(slots=True)
class _Appended:
    """Bytes to append; an attempt removes what an earlier one has left.

    Attributes:
        end: Of the file before the first attempt; `None` if there was none yet.
    """

    path: Path
    content: bytes
    end: int | None = None

    def __call__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would be written again when the file is closed after an error.
        with self.path.open("ab", buffering=0) as file:
            if self.end is None:
                self.end = file.tell()
            file.truncate(self.end)
            left = memoryview(self.content)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())


def append_bytes(path: Path, content: bytes) -> None:
    """Append to a file and leave it on the disk; of a write that fails nothing stays, if the system
    lets go of it.

    Raises:
        OSError: There is no room or no permission.
    """
    append = _Appended(path, content)
    try:
        append()
    except OSError:
        if append.end is not None:
            os.truncate(path, append.end)
        raise


class RecordWriter:
    """Writes records, and keeps those that storage refuses.

    Args:
        max_waiting_bytes: Records that may wait; more end the run.
    """

    def __init__(self, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[tuple[Callable[[], object], int]] = deque()
        self._num_failed = 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the records that wait."""
        return sum(size for _, size in self._waiting)

    def replace(self, path: Path, content: bytes) -> None:
        """Write a whole file, when those before are written.

        Raises:
            ZppoError: Too much waits.
        """
        self._add(partial(write_atomically, path, content), len(content))

    def append(self, path: Path, content: bytes) -> None:
        """Append to a file, when those before are written; raises as `replace`."""
        self._add(_Appended(path, content), len(content))

    def flush(self) -> str:
        """Try to write what waits; returns why something still does, or nothing."""
        while self._waiting:
            try:
                self._waiting[0][0]()
            except OSError as error:
                self._num_failed += 1
                return f"{len(self._waiting)} records of steps wait for storage, got {error}"
            self._waiting.popleft()
        return ""

    def take_num_failed(self) -> int:
        """Return the attempts that failed since the last call."""
        taken, self._num_failed = self._num_failed, 0
        return taken

    def _add(self, write: Callable[[], object], size: int) -> None:
        is_first = not self._waiting
        self._waiting.append((write, size))
        problem = self.flush()
        if not problem:
            if not is_first:
                logger.info("records: storage has taken what waited for it")
        elif self.waiting_bytes > self._max_waiting_bytes:
            raise ZppoError(
                f"records: {problem}, {self.waiting_bytes} bytes, expected at most "
                f"{self._max_waiting_bytes}; the same command continues from the newest checkpoint "
                "when the run's folder can be written again"
            )
        elif is_first:
            logger.warning("records: %s; the run goes on", problem)

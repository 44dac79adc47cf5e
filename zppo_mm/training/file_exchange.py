"""How the thread that writes a rank's file reports to rank 0's that it is done, without the
training threads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Protocol

from zppo_mm.errors import CheckpointError
from zppo_mm.weights.distributed_folder import WrittenFile

PAUSE_SECONDS = 0.05


class Store(Protocol):
    """The part of torch's key-value stores that is needed; none of the calls here waits for another
    process.
    """

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def delete_key(self, key: str, /) -> bool: ...


class FileExchange:
    """One rank's part in a save.

    Args:
        store: Of the run's ranks.
        name: Of the save, the same on every rank and on no other save.
        rank: Of this process.
        size: Ranks.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._keys = [f"{name}/{each}" for each in range(size)]

    def of_all(self, write: Callable[[], WrittenFile]) -> list[WrittenFile] | None:
        """Write this rank's file; returns the files of all ranks on rank 0, as soon as they are
        there, nothing on the others.

        Raises:
            CheckpointError: On rank 0, if another rank could not write; that one raises its own
                error.
        """
        try:
            file = write()
        except BaseException as error:
            self._send(None, f"{type(error).__name__}: {error}")
            raise
        if self._rank != 0:
            self._send(file.to_json(), "")
            return None
        files = [file]
        for key in self._keys[1:]:
            while not self._store.check([key]):
                time.sleep(PAUSE_SECONDS)
            text, problem = json.loads(self._store.get(key))
            self._store.delete_key(key)
            if problem:
                raise CheckpointError(
                    f"checkpoint: a rank could not write its file, got {problem}, expected room; "
                    "check the disk"
                )
            files.append(WrittenFile.from_json(text))
        return files

    def _send(self, text: str | None, problem: str) -> None:
        if self._rank != 0:
            self._store.set(self._keys[self._rank], json.dumps([text, problem]))

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
        self._begun = f"{name}/begun"
        self._keys = [f"{name}/{each}" for each in range(size)]

    def begin(self, prepare: Callable[[], None]) -> None:
        """Prepare on rank 0 what all ranks write to; the others wait until that is done.

        Raises:
            CheckpointError: On the other ranks, if it failed on rank 0, which raises its own error.
        """
        if self._rank == 0:
            problem = ""
            try:
                prepare()
            except BaseException as error:
                problem = _named(error)
                raise
            finally:
                self._store.set(self._begun, problem)
            return
        if problem := self._received(self._begun).decode():
            raise _failure(problem)

    def of_all(self, write: Callable[[], WrittenFile]) -> list[WrittenFile] | None:
        """Write this rank's file; returns the files of all ranks on rank 0, as soon as they are
        there, nothing on the others. On rank 0 no rank writes any more afterwards.

        Raises:
            CheckpointError: On rank 0, if another rank could not write; that one raises its own
                error.
        """
        files, own = [], None
        try:
            files.append(write())
        except BaseException as error:
            own = error
        if self._rank != 0:
            text = "" if own is not None else files[0].to_json()
            self._store.set(self._keys[self._rank], json.dumps([text, own and _named(own)]))
        else:
            problems = []
            for key in self._keys[1:]:
                text, problem = json.loads(self._received(key))
                self._store.delete_key(key)
                if problem is not None:
                    problems.append(problem)
                else:
                    files.append(WrittenFile.from_json(text))
            self._store.delete_key(self._begun)
            if problems and own is None:
                own = _failure(problems[0])
        if own is not None:
            raise own
        return files if self._rank == 0 else None

    def _received(self, key: str) -> bytes:
        while not self._store.check([key]):
            time.sleep(PAUSE_SECONDS)
        return self._store.get(key)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _failure(problem: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: a rank could not write its file, got {problem}, expected room; check the disk"
    )

"""Ranks that wait for one another as long as all are alive, and tell one another that the run is to
end.

A collective that waits has a time limit, which a healthy rank can reach: one replica samples for
longer than another, or opens slower media. So ranks meet at the job's store first, and every rank
gives signs of life there from a thread of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Protocol, cast

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.interruption import Interruption
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.groups import LostRankError
from zppo_mm.parallel.partition import JobPartition

BEAT_SECONDS = 1.0
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.0005, 0.2
_STOP, _LOST = "stop", "lost"


class Store(Protocol):
    """The part of torch's key-value stores that is needed; none of the calls here waits for another
    process.
    """

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...

    def delete_key(self, key: str, /) -> bool: ...


class Meetings:
    """One rank's place among the ranks of its world.

    Args:
        store: Of this world.
        job_store: Of the whole job, for the word that the run is to end.
        rank: Of this process.
        size: Ranks of the world.
        silence_seconds: A rank that has given no sign of life for so long is taken for dead.
        interruption: Told to the others, and told by them.
    """

    def __init__(
        self,
        store: Store,
        job_store: Store,
        rank: int,
        size: int,
        *,
        silence_seconds: float,
        interruption: Interruption,
    ) -> None:
        self._store = store
        self._job_store = job_store
        self._rank = rank
        self._size = size
        self._silence_seconds = silence_seconds
        self._interruption = interruption
        self._num_met = 0
        self._last_beats = {other: (0, time.monotonic()) for other in range(size)}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="signs of life", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait until every rank has arrived.

        Raises:
            LostRankError: A rank is dead, cut off, or has ended with an error.
        """
        self._num_met += 1
        arrived, met = f"arrived/{self._num_met}", f"met/{self._num_met}"
        if self._store.add(arrived, 1) == self._size:
            self._store.set(met, "1")
        pause = SHORTEST_PAUSE_SECONDS
        while not self._store.check([met]):
            if self._store.check([_LOST]):
                raise LostRankError(
                    f"parallel: rank {self._rank} lost another process of the run, got "
                    f"{self._store.get(_LOST).decode()!r}, expected every rank to live; look at "
                    "its output, then start the run again to resume"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        if self._rank == 0 and self._num_met > 1:
            # Everybody is here, so everybody has left the one before.
            self._store.delete_key(f"arrived/{self._num_met - 1}")
            self._store.delete_key(f"met/{self._num_met - 1}")

    def leave(self, problem: str = "") -> None:
        """Give no signs of life any more; with a problem, ranks that wait for this one are told."""
        self._ended.set()
        self._thread.join()
        if problem:
            # Without a store there is nobody left to hear it.
            with contextlib.suppress(RuntimeError):
                self._store.set(_LOST, f"rank {self._rank}: {problem}")

    def _beat(self) -> None:
        # The store goes with the process that holds it; whoever needs it next says so.
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(BEAT_SECONDS):
                self._store.add(f"beat/{self._rank}", 1)
                self._pass_on()
                if self._rank == 0:
                    self._look_for_silent()

    def _pass_on(self) -> None:
        """Tell the other ranks that the run is to end, or hear it from them."""
        if not self._interruption.is_requested:
            if self._job_store.check([_STOP]):
                self._interruption.request(self._job_store.get(_STOP).decode())
        elif not self._job_store.check([_STOP]):
            self._job_store.set(_STOP, self._interruption.reason)

    def _look_for_silent(self) -> None:
        now = time.monotonic()
        for other, (last, _) in list(self._last_beats.items()):
            beats = self._store.add(f"beat/{other}", 0)
            if beats != last:
                self._last_beats[other] = (beats, now)
        silent = [
            other
            for other, (_, seen) in self._last_beats.items()
            if now - seen > self._silence_seconds
        ]
        if silent:
            self._store.set(
                _LOST, f"rank {silent[0]}: no sign of life within parallel.timeout_minutes"
            )


@contextlib.contextmanager
def open_meetings(
    config: ParallelConfig, world: JobPartition | None, interruption: Interruption
) -> Iterator[Meetings | None]:
    """Hold this rank's place among the ranks of its world; `None` in a job of one process. Process
    groups must be initialised.

    An error that ends the block is told to the ranks that wait for this one.
    """
    if world is None and parallel.world_size() == 1:
        yield None
        return
    own = cast(Store, parallel.store())
    meetings = Meetings(
        own,
        cast(Store, world.store) if world is not None else own,
        parallel.rank(),
        parallel.world_size(),
        silence_seconds=60 * config.timeout_minutes,
        interruption=interruption,
    )
    try:
        yield meetings
    except BaseException as error:
        meetings.leave(f"{type(error).__name__}: {error}")
        raise
    meetings.leave()

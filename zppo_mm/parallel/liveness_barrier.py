"""A barrier that waits as long as all ranks are alive, and spreads the request to end the run.

A collective has a time limit, which a healthy rank can reach: one replica samples for longer than
another, or opens slower media. So ranks wait at the job's store first, where every rank writes
heartbeats from a thread of its own.
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
from zppo_mm.parallel.failures import RankFailureError
from zppo_mm.parallel.partition import JobPartition

BEAT_SECONDS = 1.0
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.0005, 0.2
FAILURE = "failure"
"""Key of the store under which a rank reports the failure of one to the others."""
_STOP = "stop"


class Store(Protocol):
    """The part of torch's key-value stores that is needed; none of the calls here waits for another
    process.
    """

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...

    def delete_key(self, key: str, /) -> bool: ...


class LivenessBarrier:
    """A barrier for the ranks of one partition, with heartbeats.

    Args:
        store: Of this partition.
        job_store: Of the whole job, where the request to end the run is passed on.
        rank: Of this process.
        size: Ranks of the partition.
        timeout_seconds: A rank without a heartbeat for so long is taken for dead.
        interruption: Passed on to the other ranks, and set on their request.
    """

    def __init__(
        self,
        store: Store,
        job_store: Store,
        rank: int,
        size: int,
        *,
        timeout_seconds: float,
        interruption: Interruption,
    ) -> None:
        self._store = store
        self._job_store = job_store
        self._rank = rank
        self._size = size
        self._timeout_seconds = timeout_seconds
        self._interruption = interruption
        self._num_waits = 0
        # Per rank its heartbeats so far, and when the last one was noticed.
        self._last_beats = {other: (0, time.monotonic()) for other in range(size)}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until every rank has arrived.

        Raises:
            RankFailureError: A rank is dead, cut off, or has ended with an error.
        """
        self._num_waits += 1
        arrived, released = f"arrived/{self._num_waits}", f"released/{self._num_waits}"
        if self._store.add(arrived, 1) == self._size:
            self._store.set(released, "1")
        pause = SHORTEST_PAUSE_SECONDS
        while not self._store.check([released]):
            if self._store.check([FAILURE]):
                raise RankFailureError(
                    f"parallel: rank {self._rank} lost another process of the run, got "
                    f"{self._store.get(FAILURE).decode()!r}, expected every rank to live; look at "
                    "its output, then start the run again to resume"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        if self._rank == 0 and self._num_waits > 1:
            # All have arrived here, so all have left the wait before.
            self._store.delete_key(f"arrived/{self._num_waits - 1}")
            self._store.delete_key(f"released/{self._num_waits - 1}")

    def close(self, problem: str = "") -> None:
        """Stop the heartbeats; a problem is reported to the ranks that wait for this one."""
        self._closed.set()
        self._thread.join()
        if problem:
            # Without a store no rank is left to read it.
            with contextlib.suppress(RuntimeError):
                self._store.set(FAILURE, f"rank {self._rank}: {problem}")

    def _beat(self) -> None:
        # The store ends with the process that holds it; the next call that needs it raises.
        with contextlib.suppress(RuntimeError):
            while not self._closed.wait(BEAT_SECONDS):
                self._store.add(f"beat/{self._rank}", 1)
                self._pass_on_request()
                if self._rank == 0:
                    self._check_heartbeats()

    def _pass_on_request(self) -> None:
        """Send the request to end the run to the other ranks, or take it from them."""
        if not self._interruption.is_requested:
            if self._job_store.check([_STOP]):
                self._interruption.request(self._job_store.get(_STOP).decode())
        elif not self._job_store.check([_STOP]):
            self._job_store.set(_STOP, self._interruption.reason)

    def _check_heartbeats(self) -> None:
        now = time.monotonic()
        for other, (last, _) in list(self._last_beats.items()):
            beats = self._store.add(f"beat/{other}", 0)
            if beats != last:
                self._last_beats[other] = (beats, now)
        silent = [
            other
            for other, (_, seen) in self._last_beats.items()
            if now - seen > self._timeout_seconds
        ]
        if silent:
            self._store.set(
                FAILURE, f"rank {silent[0]}: no heartbeat within parallel.timeout_minutes"
            )


@contextlib.contextmanager
def open_liveness_barrier(
    config: ParallelConfig, partition: JobPartition | None, interruption: Interruption
) -> Iterator[LivenessBarrier | None]:
    """Yield a barrier for the ranks of this partition, `None` in a job of one process. Process
    groups must be initialised.

    An error that ends the block is reported to the ranks that wait for this one.
    """
    if partition is None and parallel.world_size() == 1:
        yield None
        return
    own = cast(Store, parallel.store())
    barrier = LivenessBarrier(
        own,
        cast(Store, partition.store) if partition is not None else own,
        parallel.rank(),
        parallel.world_size(),
        timeout_seconds=60 * config.timeout_minutes,
        interruption=interruption,
    )
    try:
        yield barrier
    except BaseException as error:
        barrier.close(f"{type(error).__name__}: {error}")
        raise
    barrier.close()

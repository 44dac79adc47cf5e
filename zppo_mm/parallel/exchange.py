"""How replicas of the model exchange what they sampled, as a protocol so that one process needs no
groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from zppo_mm.interruption import StopRequested
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel import replica
from zppo_mm.parallel.liveness_barrier import LivenessBarrier
from zppo_mm.parallel.wait_clock import WaitClock

T = TypeVar("T")


class Exchange(Protocol):
    """The replica of this rank, and two collectives that every rank calls together."""

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to."""
        ...

    @property
    def num_replicas(self) -> int:
        """Replicas of the model in the run."""
        ...

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the leader of its replica."""
        ...

    def gather(self, local: Sequence[T]) -> list[list[T]]:
        """Return the list of every replica's leader, in the order of the replicas; the other ranks'
        lists do not count.
        """
        ...

    def gather_in_replica(self, local: Sequence[T]) -> list[list[T]]:
        """Return the lists of all ranks of this replica."""
        ...


def never() -> bool:
    """Return that a run is not to end before its time."""
    return False


class ParallelExchange:
    """The run's process groups.

    Args:
        barrier: Waits for slow ranks before each collective; `None` leaves that to the time limit
            of the process group.
        should_stop: Whether the run is to end, as far as this rank knows; once true, it stays so.

    Attributes:
        waits: Time that this rank spent in exchanges between replicas.
    """

    def __init__(
        self, barrier: LivenessBarrier | None = None, should_stop: Callable[[], bool] = never
    ) -> None:
        self._barrier = barrier
        self.should_stop = should_stop
        self.waits = WaitClock()

    @property
    def replica(self) -> int:
        """Rank among the data-parallel and context ranks."""
        return parallel.replica_rank()

    @property
    def num_replicas(self) -> int:
        """Data-parallel size x context size."""
        return parallel.num_replicas()

    @property
    def is_leader(self) -> bool:
        """Whether this is tensor rank 0 of the last stage."""
        return parallel.is_replica_leader()

    def gather(self, local: Sequence[T]) -> list[list[T]]:
        """Exchange what the replicas have.

        Raises:
            StopRequested: On every rank, if any of them knows that the run is to end.
        """
        with self.waits.waiting():
            if self._barrier is not None:
                self._barrier.wait()
            by_replica, is_stopping = parallel.gather_with_flag(local, self.should_stop())
        if is_stopping:
            raise StopRequested
        return by_replica

    def gather_in_replica(self, local: Sequence[T]) -> list[list[T]]:
        """Exchange what the ranks of this replica have."""
        return replica.gather_in_replica(list(local))


class SingleProcess:
    """One process that is the whole run."""

    replica = 0
    num_replicas = 1
    is_leader = True

    def gather(self, local: Sequence[T]) -> list[list[T]]:
        """Return the own list."""
        return [list(local)]

    def gather_in_replica(self, local: Sequence[T]) -> list[list[T]]:
        """Return the own list."""
        return [list(local)]

"""Watches every process of a run for one that hangs, with what is no hang in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

from data.file_lock import wait_for_lock
from data.media.disk_cache import DiskCache
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.hang_watch import HangWatch
from zppo_mm.parallel.liveness_barrier import LivenessBarrier, Store
from zppo_mm.parallel.partition import JobPartition
from zppo_mm.rollout.served.supervision import RolloutServers
from zppo_mm.teacher.served.rank_server import RankServer
from zppo_mm.teacher.served.teacher_ranks import TeacherRanks

BOUNDED_WAITS: tuple[Callable[..., object], ...] = (
    # For other ranks, as long as they send heartbeats.
    LivenessBarrier.wait,
    parallel.on_rank_zero,
    parallel.on_all_ranks,
    # For servers and worker processes; whoever makes a future gives its work a deadline.
    Future.result,
    wait,
    RolloutServers.publish,
    # For what another process fetches or decodes, with time limits; its end frees the lock.
    wait_for_lock,
    DiskCache._locked,
    # Of the student's and the teacher's ranks for one another, as long as they send heartbeats.
    TeacherRanks.wait_until_ready,
    TeacherRanks.open_pool,
    RankServer.next_turn,
)
"""Functions in which a process waits for others, each with a limit of its own."""


@contextmanager
def finding_hangs(
    config: ParallelConfig, stacks: Path, partition: JobPartition | None
) -> Iterator[None]:
    """Watch this process inside the block; process groups must be initialised.

    Args:
        config: Says after which time a process hangs; 0 watches nothing.
        stacks: Folder that takes the stacks of a run that hangs.
        partition: Of this process; `None` in a job with one.
    """
    if not config.hang_minutes:
        yield
        return
    name = f"{partition.name if partition is not None else 'student'}_{parallel.rank():05d}"
    watch = HangWatch(
        cast(Store, parallel.store()) if parallel.world_size() > 1 else None,
        f"rank {parallel.rank()}",
        stacks / f"{name}.txt",
        60 * config.hang_minutes,
        bounded_waits=BOUNDED_WAITS,
        is_computing_progress=parallel.device().type == "cpu",
    )
    with closing(watch):
        yield

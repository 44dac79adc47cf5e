"""A job in two partitions: the student's processes and, on the last ranks, the teacher's.

Each partition has a default process group of its own, so that Megatron and everything above it see
a whole job. No collective spans both. They share the job's store, through which each learns that
the other has ended.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from torch.distributed import Store  # type: ignore[attr-defined]

from zppo_mm.config.schema import ParallelConfig, TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.job_store import join_job
from zppo_mm.parallel.layout import validate_layout

PartitionName = Literal["student", "teacher"]

HEARTBEAT_SECONDS = 5.0
# The exit reason of a partition that ended as it should.
DONE = "done"


@dataclass(frozen=True, slots=True)
class JobPartition:
    """This process's part of a divided job.

    Attributes:
        name: Whose processes they are.
        rank: Of this process in its partition.
        size: Processes of the partition.
        job_rank: Rank in the whole job.
        store: The job's store, shared by both partitions.
    """

    name: PartitionName
    rank: int
    size: int
    job_rank: int
    store: Store

    @property
    def other(self) -> PartitionName:
        """The other partition's name."""
        return "teacher" if self.name == "student" else "student"


class PartitionLink:
    """Reports the end of each of the two partitions of a job to the other. Every rank has one.

    Rank 0 of each partition sends heartbeats.

    Args:
        partition: Of this process.
        timeout_seconds: A partition without a heartbeat for so long counts as lost.
    """

    def __init__(self, partition: JobPartition, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._partition = partition
        self._store = partition.store
        self._last_heartbeat = (0, time.monotonic())
        self._ended = threading.Event()
        if partition.rank == 0:
            threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True).start()

    def publish(self, name: str, value: str) -> None:
        """Give the other partition a value."""
        self._store.set(f"{self._partition.name}/{name}", value)

    def lookup(self, name: str) -> str | None:
        """Return a value that the other partition gave, `None` before it has."""
        key = f"{self._partition.other}/{name}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def leave(self, reason: str = DONE) -> None:
        """Say why this partition ends. The first reason counts, and this rank sends no heartbeat
        after it.
        """
        self._ended.set()
        with contextlib.suppress(RuntimeError):  # without a store nobody can read it
            self._store.compare_set(f"{self._partition.name}/exit_reason", "", reason)

    def exit_reason(self) -> str | None:
        """Return why the other partition ended, `None` while it has not."""
        return self.lookup("exit_reason")

    def is_other_lost(self) -> bool:
        """Return whether the other partition has sent no heartbeat for the time limit."""
        count, now = self._store.add(f"{self._partition.other}/heartbeats", 0), time.monotonic()
        if count != self._last_heartbeat[0]:
            self._last_heartbeat = (count, now)
        return now - self._last_heartbeat[1] > self.timeout_seconds

    def _send_heartbeats(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store ended with the process that holds it
            while not self._ended.is_set():
                self._store.add(f"{self._partition.name}/heartbeats", 1)
                self._ended.wait(HEARTBEAT_SECONDS)


def teacher_layout(teacher: TeacherConfig, student: ParallelConfig) -> ParallelConfig:
    """Return the layout of the teacher's partition; the sizes divide its ranks into replicas."""
    return ParallelConfig(
        tensor_model_parallel_size=teacher.tensor_model_parallel_size,
        pipeline_model_parallel_size=teacher.pipeline_model_parallel_size,
        timeout_minutes=student.timeout_minutes,
    )


def divide_job(student: ParallelConfig, teacher: TeacherConfig) -> JobPartition | None:
    """Join the job's store and return this process's partition; `None` if the teacher has no ranks
    of its own.

    Raises:
        ConfigError: On every rank, if there are too few processes or the student's cannot be laid
            out.
    """
    if not teacher.num_ranks:
        return None
    size = int(os.environ.get("WORLD_SIZE", "1"))
    num_students = size - teacher.num_ranks
    if num_students < 1:
        raise ConfigError(
            f"teacher.num_ranks: leaves the student none, got {teacher.num_ranks} of {size} "
            "process(es), expected fewer than there are; start more processes (torchrun "
            "--nproc-per-node) or lower it"
        )
    # On the teacher's ranks too, so that nobody waits for a process that has given up.
    validate_layout(student, num_students, num_others=teacher.num_ranks)
    store, rank, _ = join_job(timedelta(minutes=student.timeout_minutes))
    if rank < num_students:
        return JobPartition("student", rank, num_students, rank, store)
    return JobPartition("teacher", rank - num_students, teacher.num_ranks, rank, store)

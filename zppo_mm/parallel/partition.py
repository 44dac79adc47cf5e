"""Two worlds in one job: the student's processes and, on the last ranks, the teacher's.

Each has a default process group of its own, so that Megatron and everything above it see one world
that is whole. No collective spans both; they share the job's store and nothing else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from torch.distributed import Store, rendezvous  # type: ignore[attr-defined]

from zppo_mm.config.schema import ParallelConfig, TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.groups import explain_unreachable, validate_layout

PartitionName = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True)
class JobPartition:
    """This process's place in a divided job.

    Attributes:
        name: Whose world it is.
        rank: Place in it.
        size: Its processes.
        job_rank: Place in the whole job.
        store: The job's store; what is written there is seen from both worlds.
    """

    name: PartitionName
    rank: int
    size: int
    job_rank: int
    store: Store


def teacher_layout(teacher: TeacherConfig, student: ParallelConfig) -> ParallelConfig:
    """Return the layout of the teacher's world; what its sizes leave of its ranks are replicas of
    the teacher.
    """
    return ParallelConfig(
        tensor_model_parallel_size=teacher.tensor_model_parallel_size,
        pipeline_model_parallel_size=teacher.pipeline_model_parallel_size,
        timeout_minutes=student.timeout_minutes,
    )


def divide_job(student: ParallelConfig, teacher: TeacherConfig) -> JobPartition | None:
    """Meet the job's other processes at its store and find this one's place; `None` if the teacher
    has no ranks of its own.

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
    with explain_unreachable():
        store, rank, _ = next(
            rendezvous("env://", timeout=timedelta(minutes=student.timeout_minutes))
        )
    if rank < num_students:
        return JobPartition("student", rank, num_students, rank, store)
    return JobPartition("teacher", rank - num_students, teacher.num_ranks, rank, store)

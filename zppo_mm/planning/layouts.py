"""The layouts that a run could have on some GPUs, and why others are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from zppo_mm.config.schema import ParallelConfig, RunConfig
from zppo_mm.conversion.description import SIZES, LayoutMemory
from zppo_mm.errors import ZppoError
from zppo_mm.models.decoding.cache_size import GIB
from zppo_mm.models.families.architecture import Architecture, check_layout
from zppo_mm.planning.activations import FLOAT32, Precision
from zppo_mm.planning.machine import MachineRates
from zppo_mm.planning.memory import MemoryEstimate, cache_bytes, estimate_memory, fullest_rank
from zppo_mm.planning.workload import Workload
from zppo_mm.zone.hard import count_of_fraction

CONTEXT_SIZES = (1, 2, 4)
MICRO_BATCH_TOKENS = (8192, 16384, 32768)
MAX_BATCH_SIZES = (256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
"""Rollouts at once; the largest that fits is taken."""
TEACHER_GPUS = (1, 2, 4)
"""Of a node, for a teacher that has GPUs of its own."""
VLLM_GPUS = (1, 2, 4)
"""Of a node, for servers that sample."""
SLOW_GPUS = 1 << 21
"""In the place of a step's number, names the draw of slow GPUs."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the teacher runs.

    Attributes:
        kind: `none`, `served` (by servers), `ranks` (of the job, its own) or `in turn` (with the
            student on the same ranks).
        gpus_per_node: That only the teacher uses.
    """

    kind: str
    gpus_per_node: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout, and the run that has it.

    Attributes:
        config: The run with the layout's keys.
        placement: Of the teacher.
        num_student_ranks: GPUs of the student.
        num_nodes: Nodes of the job.
        memory: Of the fullest GPU; `None` if it could not be counted.
        refusal: Why it cannot be; empty if it can.
        vllm_gpus_per_node: That vLLM servers use, each one, to sample.
    """

    config: RunConfig
    placement: Placement
    num_student_ranks: int
    num_nodes: int
    memory: MemoryEstimate | None = None
    refusal: str = ""
    vllm_gpus_per_node: int = 0

    @property
    def model_ranks(self) -> int:
        """Return the ranks of one set of weights."""
        layout = self.config.parallel
        return layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size

    @property
    def num_samplers(self) -> int:
        """Return the replicas that sample and grade; context ranks are such."""
        return self.num_student_ranks // self.model_ranks

    @property
    def num_servers(self) -> int:
        """Return the vLLM servers that sample in their place."""
        return self.vllm_gpus_per_node * self.num_nodes

    @property
    def num_replicas(self) -> int:
        """Return the replicas that share an update."""
        return self.num_samplers // self.config.parallel.context_parallel_size

    def slowdowns(self, workload: Workload) -> list[float]:
        """Return of every replica that samples how many times longer it takes: as its slowest
        GPU.
        """
        random = np.random.default_rng((workload.seed, SLOW_GPUS))
        # A replica is slow if the least of its draws is below the share.
        least = random.random((self.num_samplers, self.model_ranks)).min(1)
        return [workload.slowdown if each < workload.slow_fraction else 1.0 for each in least]


def candidates(
    architecture: Architecture,
    config: RunConfig,
    num_gpus: int,
    machine: MachineRates,
    workload: Workload,
    splits: list[LayoutMemory],
    teacher_gpus: Sequence[int] = TEACHER_GPUS,
) -> list[Candidate]:
    """Return every layout that could be asked for, with its memory or the reason against it.

    Args:
        architecture: Of the student.
        config: The run; its recomputation and whether its teacher is served are kept.
        num_gpus: Of the whole job.
        machine: Memory and size of a node.
        workload: Size of the teacher.
        splits: From `rank_parameters`.
        teacher_gpus: Of a node, that a teacher of its own may have.
    """
    found = []
    per_node = min(machine.gpus_per_node, num_gpus)
    num_nodes = -(-num_gpus // per_node)
    samplers = [gpus for gpus in VLLM_GPUS if gpus < per_node]
    if config.rollout.engine == "megatron":
        samplers = [0]
    for vllm_gpus, (placement, parallel, tokens) in product(
        samplers, list(_choices(config, num_gpus, machine, teacher_gpus))
    ):
        candidate = Candidate(
            replace(
                config, parallel=parallel, train=replace(config.train, micro_batch_tokens=tokens)
            ),
            placement,
            num_gpus - (placement.gpus_per_node + vllm_gpus) * num_nodes,
            num_nodes,
            vllm_gpus_per_node=vllm_gpus,
        )
        refusal = _refusal(architecture, candidate, machine)
        found.append(
            replace(candidate, refusal=refusal)
            if refusal
            else fitted(architecture, candidate, machine, workload, splits)
        )
    return found


def _choices(
    config: RunConfig, num_gpus: int, machine: MachineRates, teacher_gpus: Sequence[int]
) -> Iterator[tuple[Placement, ParallelConfig, int]]:
    own = config.parallel
    for placement, tensor, pipeline, context, sequence, tokens in product(
        _placements(config, min(machine.gpus_per_node, num_gpus), teacher_gpus),
        sorted({*SIZES, own.tensor_model_parallel_size}),
        sorted({*SIZES, own.pipeline_model_parallel_size}),
        sorted({*CONTEXT_SIZES, own.context_parallel_size}),
        (False, True),
        sorted({*MICRO_BATCH_TOKENS, config.train.micro_batch_tokens}),
    ):
        if tensor * pipeline * context > num_gpus or (sequence and tensor == 1):
            continue
        layout = replace(
            own,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            sequence_parallel=sequence,
        )
        yield placement, layout, tokens


def _placements(
    config: RunConfig, gpus_per_node: int, teacher_gpus: Sequence[int]
) -> list[Placement]:
    zone, reward = config.zone, config.reward
    judges = reward.judge != "never" and config.teacher.endpoints and not reward.judge_endpoints
    compresses = zone.ncq and config.teacher.compressor == "teacher"
    if not (zone.uses_teacher or compresses or config.distill.source != "none" or judges):
        return [Placement("none")]
    apart = [gpus for gpus in teacher_gpus if gpus < gpus_per_node]
    if config.teacher.endpoints:
        return [Placement("served", gpus) for gpus in apart]
    return [Placement("in turn"), *(Placement("ranks", gpus) for gpus in apart)]


def _refusal(architecture: Architecture, candidate: Candidate, machine: MachineRates) -> str:
    """Return why the layout cannot be, memory aside."""
    layout = candidate.config.parallel
    try:
        check_layout(architecture, layout)
    except ZppoError as error:
        return str(error).split("; ", 1)[0]
    if candidate.config.distill.source != "none":
        refusal = _refusal_to_distil(candidate)
        if refusal:
            return refusal
    ranks = candidate.model_ranks * layout.context_parallel_size
    if candidate.num_student_ranks < 1 or candidate.num_student_ranks % ranks:
        return (
            f"{candidate.num_student_ranks} student ranks do not divide by tensor x pipeline x "
            f"context {ranks}"
        )
    if layout.tensor_model_parallel_size > machine.gpus_per_node:
        return "tensor ranks of more than one node"
    new = candidate.config.train.num_new_questions
    if candidate.num_samplers > new:
        return f"{candidate.num_samplers} replicas for {new} new questions"
    return ""


def _refusal_to_distil(candidate: Candidate) -> str:
    """Return why there can be no distillation; `zppo_mm.config.relations` refuses the same."""
    if candidate.placement.kind == "ranks":
        return "distillation needs the teacher on the student's ranks"
    layout = candidate.config.parallel
    if candidate.placement.kind == "in turn" and layout.pipeline_model_parallel_size > 1:
        return "distillation computes the teacher on one pipeline stage"
    return ""


def fitted(
    architecture: Architecture,
    candidate: Candidate,
    machine: MachineRates,
    workload: Workload,
    splits: list[LayoutMemory],
) -> Candidate:
    """Return the candidate with as many rollouts at once as fit into memory at their longest, so
    that none is preempted, and a cache for them; or refused.
    """
    usable = machine.memory_gib * machine.usable_fraction * GIB
    for size in _batch_sizes(candidate):
        smaller = _with_rollout(candidate.config, max_batch_size=size, cache_memory_gib=math.inf)
        candidate = replace(candidate, config=smaller)
        memory = counted(architecture, candidate, machine, workload, splits)
        sampler = _server_bytes(architecture, candidate, machine, splits)
        if max(memory.peak, sampler) <= usable:
            budget = math.ceil(10 * memory.cache / GIB) / 10
            if not candidate.num_servers:
                smaller = _with_rollout(smaller, cache_memory_gib=budget)
            return replace(candidate, config=smaller, memory=memory)
    largest = _largest(memory) if memory.peak > usable else "weights and cache of a vLLM server"
    return replace(
        candidate,
        memory=memory,
        refusal=f"{max(memory.peak, sampler) / GIB:.1f} GiB with {size} rollouts at once, of "
        f"{usable / GIB:.1f} usable: {largest}",
    )


def _batch_sizes(candidate: Candidate) -> list[int]:
    """Return how many rollouts at once are tried, the most first."""
    config = candidate.config
    prompts = config.train.num_new_questions
    prompts += count_of_fraction(config.zone.rho_replay, prompts) * config.zone.replay
    samplers = candidate.num_servers or candidate.num_samplers
    most = min(-(-prompts // samplers) * config.rollout.num_rollouts, MAX_BATCH_SIZES[0])
    return [most, *(size for size in MAX_BATCH_SIZES if size < most)]


def _server_bytes(
    architecture: Architecture,
    candidate: Candidate,
    machine: MachineRates,
    splits: list[LayoutMemory],
) -> int:
    """Return the bytes of a vLLM server on one GPU, weights and cache; 0 without servers."""
    if not candidate.num_servers:
        return 0
    alone = replace(candidate.config, parallel=ParallelConfig())
    cache = cache_bytes(architecture, alone, Precision(machine.element_bytes))
    return cache + fullest_rank(splits, alone.parallel) * machine.element_bytes


def _with_rollout(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, rollout=replace(config.rollout, **changes))


def counted(
    architecture: Architecture,
    candidate: Candidate,
    machine: MachineRates,
    workload: Workload,
    splits: list[LayoutMemory],
) -> MemoryEstimate:
    """Return the memory of the candidate as it is."""
    # GPUs compute in bfloat16.
    precision = Precision(machine.element_bytes, on_gpu=machine.element_bytes < FLOAT32)
    memory = estimate_memory(
        architecture, candidate.config, candidate.num_student_ranks, splits, precision
    )
    if candidate.placement.kind != "in turn":
        return memory
    teacher = workload.teacher
    weights = int(teacher.parameters * machine.element_bytes / candidate.model_ranks)
    return replace(memory, teacher=weights)


def _largest(memory: MemoryEstimate) -> str:
    """Return the three largest parts."""
    names = [name for name in memory.__slots__ if getattr(memory, name)]
    names.sort(key=lambda name: -getattr(memory, name))
    return ", ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in names[:3])

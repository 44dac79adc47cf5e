"""The plan of a run: all its layouts with memory and step time, the fastest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.decoding.cache_size import GIB
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.planning.layouts import TEACHER_GPUS, Candidate, candidates
from zppo_mm.planning.machine import MachineRates
from zppo_mm.planning.memory import MemoryEstimate, rank_parameters
from zppo_mm.planning.step_time import Simulator, StepSeconds
from zppo_mm.planning.workload import Workload
from zppo_mm.text_table import text_table

HOUR = 3600
_NAMES = ("tp", "pp", "cp", "dp", "sp", "pack", "rollouts", "sampling", "teacher")


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """A layout that fits, and its step."""

    candidate: Candidate
    seconds: StepSeconds


@dataclass(frozen=True, slots=True)
class Plan:
    """All layouts of a run.

    Attributes:
        layouts: Those that fit, the fastest first.
        refused: The others.
    """

    layouts: tuple[PlannedLayout, ...]
    refused: tuple[Candidate, ...]


def make_plan(
    architecture: Architecture,
    config: RunConfig,
    num_gpus: int,
    machine: MachineRates,
    workload: Workload,
    teacher_gpus: Sequence[int] = TEACHER_GPUS,
) -> Plan:
    """Count and simulate every layout; process groups of one rank must be initialised.

    Args:
        architecture: Of the student.
        config: The run.
        num_gpus: Of the whole job.
        machine: Its rates.
        workload: What is assumed.
        teacher_gpus: Of a node, that a teacher of its own may have.

    Raises:
        ConfigError: There are fewer GPUs than one, or more than a node but no whole nodes; or the
            run is one that is not planned.
    """
    _check_planned(config, machine)
    if num_gpus < 1 or (num_gpus > machine.gpus_per_node and num_gpus % machine.gpus_per_node):
        raise ConfigError(
            f"--gpus: no whole nodes, got {num_gpus}, expected 1 to {machine.gpus_per_node} or a "
            f"multiple of {machine.gpus_per_node} (gpus_per_node of the rates)"
        )
    splits = rank_parameters(architecture)
    parameters = {(split.tensor, split.pipeline): split.num_parameters for split in splits}
    simulator = Simulator.of(architecture, config, machine, workload)
    found = candidates(architecture, config, num_gpus, machine, workload, splits, teacher_gpus)
    planned = []
    for candidate in found:
        if candidate.refusal:
            continue
        layout = candidate.config.parallel
        split = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
        planned.append(PlannedLayout(candidate, simulator.run(candidate, parameters[split])))
    planned.sort(key=lambda each: each.seconds.total)
    return Plan(tuple(planned), tuple(each for each in found if each.refusal))


def _check_planned(config: RunConfig, machine: MachineRates) -> None:
    """Check that what the run does is counted, and was measured on the machine."""
    if config.lora.rank:
        raise ConfigError(
            "lora.rank: only runs that train all parameters are planned, got "
            f"{config.lora.rank}, expected 0; with lora.rank=0 the plan is an upper bound"
        )
    if config.rollout.engine == "vllm" and not machine.vllm.layer_seconds:
        raise ConfigError(
            f"--gpu: how fast vLLM samples on it was not measured, got {machine.name} with "
            "vllm.layer_seconds=0, expected seconds a layer; on one such GPU run `vllm bench "
            "latency --model STUDENT --batch-size 1 --input-len 32 --output-len 256`, and give a "
            "file of rates with vllm.layer_seconds = (seconds / 256 - bytes of the weights / "
            "bandwidth) / (layers + 1)"
        )


def format_plan(plan: Plan, train_iters: int, num_shown: int) -> str:
    """Return the tables of a plan: the fastest layouts, the best one's memory and options, and the
    refused.
    """
    if not plan.layouts:
        return "No layout fits.\n\n" + _refused_table(plan, num_shown)
    shown = plan.layouts[:num_shown]
    phases = [own.name for own in fields(StepSeconds)]
    head = [*_NAMES, "GiB", *phases, "step", f"hours for {train_iters}"]
    rows = [
        [
            *_cells(each.candidate),
            f"{_peak(each.candidate):.1f}",
            *(f"{getattr(each.seconds, phase):.1f}" for phase in phases),
            f"{each.seconds.total:.1f}",
            f"{each.seconds.total * train_iters / HOUR:.1f}",
        ]
        for each in shown
    ]
    memory = [own.name for own in fields(MemoryEstimate)]
    sizes = [
        [*_cells(each.candidate), *(f"{size:.1f}" for size in _sizes(each.candidate))]
        for each in shown
    ]
    parts = [
        f"{len(plan.layouts)} layouts fit, {len(plan.refused)} do not. Seconds of a step by phase:",
        text_table(head, rows, num_left=0),
        "GiB on the fullest GPU of the student:",
        text_table([*_NAMES, *memory, "peak"], sizes, num_left=0),
        "Options of the first:\n" + options(plan.layouts[0].candidate),
    ]
    if plan.refused:
        parts.append(_refused_table(plan, num_shown))
    return "\n\n".join(parts)


def options(candidate: Candidate) -> str:
    """Return a candidate's keys as words of a command line."""
    layout, config = candidate.config.parallel, candidate.config
    words = [
        f"parallel.{name}={value}".lower()
        for name, value in (
            ("tensor_model_parallel_size", layout.tensor_model_parallel_size),
            ("pipeline_model_parallel_size", layout.pipeline_model_parallel_size),
            ("context_parallel_size", layout.context_parallel_size),
            ("sequence_parallel", layout.sequence_parallel),
        )
    ]
    words.append(f"rollout.max_batch_size={config.rollout.max_batch_size}")
    if not candidate.num_servers:
        words.append(f"rollout.cache_memory_gib={config.rollout.cache_memory_gib}")
    words.append(f"train.micro_batch_tokens={config.train.micro_batch_tokens}")
    if candidate.placement.kind == "ranks":
        ranks = candidate.placement.gpus_per_node * candidate.num_nodes
        words.append(f"teacher.num_ranks={ranks}")
    return " ".join(words)


def _cells(candidate: Candidate) -> list[str]:
    layout, placement = candidate.config.parallel, candidate.placement
    teacher = placement.kind
    if placement.gpus_per_node:
        teacher += f" {placement.gpus_per_node}/node"
    return [
        str(layout.tensor_model_parallel_size),
        str(layout.pipeline_model_parallel_size),
        str(layout.context_parallel_size),
        str(candidate.num_replicas),
        "yes" if layout.sequence_parallel else "no",
        str(candidate.config.train.micro_batch_tokens),
        str(candidate.config.rollout.max_batch_size),
        f"vllm {candidate.vllm_gpus_per_node}/node" if candidate.num_servers else "ranks",
        teacher,
    ]


def _peak(candidate: Candidate) -> float:
    assert candidate.memory is not None
    return candidate.memory.peak / GIB


def _sizes(candidate: Candidate) -> list[float]:
    assert candidate.memory is not None
    names = [own.name for own in fields(MemoryEstimate)]
    return [*(getattr(candidate.memory, name) / GIB for name in names), _peak(candidate)]


def _refused_table(plan: Plan, num_shown: int) -> str:
    """Return how many layouts are refused for which reason; each reason once."""
    counts = Counter(each.refusal for each in plan.refused)
    first = {each.refusal: each for each in reversed(plan.refused)}
    rows = [
        [*_cells(first[reason]), str(count), reason]
        for reason, count in counts.most_common(4 * num_shown)
    ]
    left_out = len(counts) - len(rows)
    note = f"\n{left_out} further reasons are not shown." if left_out else ""
    head = ["refused", "because (the first such layout is shown)"]
    return text_table([*_NAMES, *head], rows, num_left=0) + note

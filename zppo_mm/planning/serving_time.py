"""The seconds of a teacher's answers and rewrites and of a judge's replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zppo_mm.planning.decoding import serve_seconds
from zppo_mm.planning.layouts import Candidate
from zppo_mm.planning.machine import MachineRates
from zppo_mm.planning.questions import SimulatedRound
from zppo_mm.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class Servers:
    """Where a large model answers.

    Attributes:
        at_once: Requests that all of them answer at once.
        latency_seconds: Of a request before its first token.
        token_seconds: Of a token, all requests under way.
    """

    at_once: int
    latency_seconds: float
    token_seconds: float

    def seconds(self, tokens: float) -> float:
        """Return the seconds of a request, once it is begun."""
        return self.latency_seconds + tokens * self.token_seconds


def teacher_servers(candidate: Candidate, workload: Workload, machine: MachineRates) -> Servers:
    """Return where the teacher answers; on the student's ranks every replica does."""
    kind, num_servers = candidate.placement.kind, candidate.num_nodes
    gpus, layer_seconds = candidate.placement.gpus_per_node, machine.decode.layer_seconds
    if kind == "in turn":
        num_servers, gpus = candidate.num_samplers, candidate.model_ranks
    if kind == "served":
        layer_seconds = workload.teacher.layer_seconds
    return _servers(candidate, workload, machine, num_servers, gpus, layer_seconds)


def judge_servers(
    candidate: Candidate, workload: Workload, machine: MachineRates
) -> Servers | None:
    """Return where the judge replies: at servers of its own, or at those of the teacher; `None`
    where there is none.
    """
    apart = len(candidate.config.reward.judge_endpoints)
    if apart:
        seconds = workload.teacher.layer_seconds
        return _servers(candidate, workload, machine, apart, workload.judge_gpus, seconds)
    if candidate.placement.kind in ("served", "ranks"):
        return teacher_servers(candidate, workload, machine)
    return None


def _servers(
    candidate: Candidate,
    workload: Workload,
    machine: MachineRates,
    num_servers: int,
    gpus: int,
    layer_seconds: float,
) -> Servers:
    """Return servers of the teacher's size, each on some GPUs."""
    assumed, rates = workload.teacher, machine.decode
    concurrency = assumed.max_concurrency or candidate.config.teacher.max_concurrency
    bandwidth = machine.memory_bandwidth * rates.bandwidth_efficiency
    flops = machine.matmul_flops * rates.matmul_efficiency
    weights = assumed.parameters * assumed.element_bytes / gpus / bandwidth
    products = 2 * assumed.parameters * concurrency / gpus / flops
    token = assumed.num_layers * layer_seconds + max(weights, products)
    return Servers(num_servers * concurrency, assumed.latency_seconds, token)


def answered_at(
    candidate: Candidate,
    step: SimulatedRound,
    ends: Sequence[float],
    bounds: Sequence[int],
    servers: Servers,
    rewrite_tokens: int,
) -> float:
    """Return when the answers that the round waits for, and the rewrites after them, are there.

    Args:
        candidate: The layout.
        step: The round.
        ends: Seconds at which the waves of plain groups are graded.
        bounds: Plain groups up to the end of each wave.
        servers: The teacher's.
        rewrite_tokens: Of a rewrite.
    """
    plain = ends[-1] if ends else 0.0
    if step.asks_first:
        asked_at = np.zeros(len(step.asked))
    elif candidate.placement.kind == "in turn":
        asked_at = np.full(len(step.asked), plain)
    else:
        asked_at = np.array(ends)[np.searchsorted(bounds, step.asked, side="right")]
    arrivals = np.repeat(asked_at, step.teacher_tokens.shape[1])
    services = servers.latency_seconds + step.teacher_tokens.ravel() * servers.token_seconds
    answered = np.array(serve_seconds(arrivals.tolist(), services.tolist(), servers.at_once))
    if step.asks_first and candidate.placement.kind == "in turn":
        # The ranks answer before they sample, or after; one after the other in any case.
        answered = answered + plain
    awaited = answered[np.repeat(step.is_awaited, step.teacher_tokens.shape[1])]
    start = max(plain, float(awaited.max(initial=0.0)))
    rewrite = servers.seconds(rewrite_tokens)
    count = step.num_rewrites
    return max([start, *serve_seconds([start] * count, [rewrite] * count, servers.at_once)])

"""The seconds of sampling and grading groups, on the student's ranks or by vLLM servers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.planning.decoding import decode_seconds
from zppo_mm.planning.layouts import Candidate
from zppo_mm.planning.machine import MachineRates
from zppo_mm.planning.operations import Work, decode_step, forward_flops, tower_flops
from zppo_mm.planning.questions import Groups
from zppo_mm.planning.serving_time import judge_servers
from zppo_mm.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class SamplingTime:
    """Computes the seconds on a machine.

    Attributes:
        architecture: Of the student.
        machine: Its rates.
        workload: What is assumed.
    """

    architecture: Architecture
    machine: MachineRates
    workload: Workload

    def waves(self, candidate: Candidate, groups: Groups) -> list[Groups]:
        """Return plain groups in the waves after which a teacher elsewhere is asked."""
        size = len(groups)
        if candidate.placement.kind in ("served", "ranks"):
            rollout = candidate.config.rollout
            size = max(1, rollout.max_batch_size // rollout.num_rollouts) * candidate.num_samplers
        bounds = [*range(0, len(groups), max(size, 1)), len(groups)]
        return [groups.part(slice(*pair)) for pair in pairwise(bounds)]

    def sample(self, candidate: Candidate, groups: Groups) -> float:
        """Return the seconds until the slowest replica, or server, has sampled its groups."""
        machine, rollout = self.machine, candidate.config.rollout
        at_once, servers = rollout.max_batch_size, candidate.num_servers
        if servers:
            step = decode_step(self.architecture, 1, machine, machine.vllm)
            at_once = min(at_once, rollout.max_concurrency * rollout.num_rollouts)
            slowdowns = [1.0] * servers
        else:
            tensor = candidate.config.parallel.tensor_model_parallel_size
            step = decode_step(self.architecture, tensor, machine, machine.decode)
            slowdowns = candidate.slowdowns(self.workload)
        slowest = 0.0
        for first, slowdown in enumerate(slowdowns[: len(groups)]):
            own = groups.part(slice(first, None, len(slowdowns)))
            seconds = self._prefill(candidate, own) + decode_seconds(
                own.responses.ravel().tolist(),
                np.repeat(own.prompts, own.responses.shape[1]).tolist(),
                at_once,
                step,
            )
            slowest = max(slowest, seconds * slowdown)
        return slowest

    def grade(self, candidate: Candidate, groups: Groups, judge_mode: str) -> float:
        """Return the seconds until all responses are graded: by rules on the replica that has the
        most, then by the judge, whose servers have nothing else to do.

        Args:
            candidate: The layout.
            groups: Sampled together.
            judge_mode: As `reward.judge`.
        """
        reward, machine, workload = candidate.config.reward, self.machine, self.workload
        if not len(groups):
            return 0.0
        own = ceil(len(groups) / candidate.num_samplers) * groups.responses.shape[1]
        algebra = own * workload.algebra_fraction / machine.algebra_per_second / reward.num_workers
        rules: float = own / machine.answers_per_second + min(algebra, reward.budget_seconds)
        judged = workload.open_fraction * groups.responses.size
        if judge_mode == "fallback":
            wrong = groups.responses.size - int(groups.num_right.sum())
            judged += (1 - workload.open_fraction) * wrong
        servers = judge_servers(candidate, workload, machine)
        if judge_mode == "never" or servers is None:
            return rules
        # They take turns, all with replies of one length.
        turns = ceil(round(judged, 6) / servers.at_once)
        return rules + turns * servers.seconds(workload.judge_tokens)

    def _prefill(self, candidate: Candidate, groups: Groups) -> float:
        """Return the seconds of a replica or server to open media and to pass prompts through the
        network.
        """
        prompts, machine = groups.prompts, self.machine
        media = (
            self.workload.media_per_question * len(groups) * (self.architecture.vision is not None)
        )
        patches = self.workload.num_patches(self.architecture, float(prompts.sum()))
        flops = sum(
            forward_flops(self.architecture, tokens, tokens / 2) for tokens in prompts.tolist()
        )
        flops += tower_flops(self.architecture, patches, max(media, 1))
        layout, rates = candidate.config.parallel, machine.train
        if candidate.num_servers:
            layout, rates = ParallelConfig(), machine.vllm
        work = Work(flops / layout.tensor_model_parallel_size, 0.0, self.architecture.num_layers)
        return media / machine.media_per_second + work.seconds(machine, rates)

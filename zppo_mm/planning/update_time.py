"""The seconds of what a step computes with its groups: old log-probs, updates, and what ranks
exchange for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zppo_mm.config.schema import RunConfig
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.provider import recomputes_vision
from zppo_mm.planning.layouts import Candidate
from zppo_mm.planning.machine import MachineRates
from zppo_mm.planning.operations import (
    Work,
    forward_work,
    output_flops,
    tower_flops,
    train_passes,
)
from zppo_mm.planning.questions import Groups, SimulatedStep
from zppo_mm.planning.workload import Lengths, Workload
from zppo_mm.training.prefix_groups import fill

GRADIENT_BYTES = 4
UPDATE_TRAFFIC = 38
"""Bytes of a parameter that an optimizer step moves: gradient read, weight and moments read and
written, the type's weight written; and the gradient set to zero and read for its norm.
"""


@dataclass(frozen=True, slots=True)
class Passes:
    """How often a pass goes through the parts of the network.

    Attributes:
        layers: Through the decoder; a backward pass counts twice.
        output: Through the output layer.
        tower: Through the vision tower.
        teacher: Through the teacher's network.
    """

    layers: int
    output: int
    tower: int
    teacher: int = 0


FORWARD = Passes(layers=1, output=1, tower=1)
"""For old log-probs."""


def passes_of_update(config: RunConfig) -> Passes:
    """Return the passes of an update; to distil, a teacher that is no server computes its
    distribution of every pack.
    """
    distills = config.distill.source != "none" and not config.teacher.endpoints
    return Passes(
        layers=train_passes(config.model.recompute),
        output=3,
        tower=4 if recomputes_vision(config.model) else 3,
        teacher=int(distills),
    )


def computes_old_logprobs(config: RunConfig, step: SimulatedStep) -> bool:
    """Return whether old log-probs are computed before the updates: to correct for the sampler, or
    of a teacher's responses.
    """
    algorithm = config.algorithm
    corrects = algorithm.largest_weight(config.rollout.engine) > 0
    corrects |= algorithm.rejection_bound > 0 or algorithm.rejection_token_bound > 0
    return config.distill.source == "none" and (corrects or step.num_injected > 0)


@dataclass(frozen=True, slots=True)
class UpdateTime:
    """Computes the seconds on a machine.

    Attributes:
        architecture: Of the student.
        machine: Its rates.
        workload: What is assumed.
    """

    architecture: Architecture
    machine: MachineRates
    workload: Workload

    def old_logprobs(self, candidate: Candidate, step: SimulatedStep) -> float:
        """Return the seconds of the forward pass before the updates; 0 if there is none."""
        if not computes_old_logprobs(candidate.config, step):
            return 0.0
        return self._all_passes(candidate, step.trained, FORWARD)

    def update(self, candidate: Candidate, groups: Groups, num_parameters: int) -> float:
        """Return the seconds of all updates of a step."""
        config, machine = candidate.config, self.machine
        passes = self._all_passes(candidate, groups, passes_of_update(config))
        reduced = self.collective(candidate, num_parameters * GRADIENT_BYTES)
        shard = num_parameters
        if config.parallel.use_distributed_optimizer:
            shard //= candidate.num_samplers
        moved = shard * UPDATE_TRAFFIC + 2 * GRADIENT_BYTES * num_parameters
        optimizer = Work(traffic=moved).seconds(machine, machine.train)
        return passes + config.train.updates_per_step * (reduced + optimizer)

    def collective(self, candidate: Candidate, size: float) -> float:
        """Return the seconds to reduce-scatter or gather some bytes over the replicas."""
        ranks = candidate.num_samplers
        if ranks == 1:
            return 0.0
        machine = self.machine
        inside = candidate.num_nodes == 1
        bandwidth = machine.node_bandwidth if inside else machine.network_bandwidth
        return machine.message_seconds + size * (ranks - 1) / ranks / bandwidth

    def _all_passes(self, candidate: Candidate, groups: Groups, passes: Passes) -> float:
        """Return the seconds of the passes of all updates; the slowest replica is waited for."""
        per_update = -(-len(groups) // candidate.config.train.updates_per_step)
        seconds = sum(
            self._pass(candidate, groups.part(slice(first, first + per_update)), passes)
            for first in range(0, len(groups), max(per_update, 1))
        )
        return seconds * max(candidate.slowdowns(self.workload), default=1.0)

    def _pass(self, candidate: Candidate, groups: Groups, passes: Passes) -> float:
        """Return the seconds of one update's passes on the replica that has the most tokens."""
        is_shared = self.machine.shares_prompts and candidate.config.train.share_prompts != "never"
        copies = np.ones(len(groups), dtype=np.int64)
        if not is_shared:
            copies = (groups.responses > 0).sum(1)
        sizes = groups.responses.sum(1) + copies * groups.prompts
        replicas: list[list[int]] = [[] for _ in range(candidate.num_replicas)]
        totals = np.zeros(candidate.num_replicas)
        for index in np.argsort(-sizes, kind="stable").tolist():
            lightest = int(totals.argmin())
            replicas[lightest].append(index)
            totals[lightest] += sizes[index]
        # No group is divided where the replicas differ by less than a sample.
        longest = int((groups.responses.max(1) + groups.prompts).max(initial=0))
        mean = float(sizes.sum()) / candidate.num_replicas
        chosen = np.array(replicas[int(totals.argmax())], dtype=np.int64)
        excess = min(float(totals.max()), mean + longest / 2) / max(float(totals.max()), 1.0)
        return self._replica_pass(candidate, groups.part(chosen), copies[chosen], passes) * excess

    def _replica_pass(
        self, candidate: Candidate, groups: Groups, copies: Lengths, passes: Passes
    ) -> float:
        """Return the seconds of a replica's passes; every prompt is computed `copies` times."""
        layout = candidate.config.parallel
        if not len(groups):
            return 0.0
        samples = (groups.responses + groups.prompts[:, None])[groups.responses > 0]
        tokens = float(groups.responses.sum() + (copies * groups.prompts).sum())
        # Samples that share a prompt are shorter by it.
        scale = tokens / float(samples.sum())
        lengths = {index: (int(size * scale),) for index, size in enumerate(samples.tolist())}
        packs = len(fill(lengths, (candidate.config.train.micro_batch_tokens,)))
        context = float((samples.astype(float) ** 2).sum() / samples.sum() / 2)
        stages = layout.pipeline_model_parallel_size
        work = forward_work(self.architecture, layout, tokens, context) * passes.layers
        work += Work(layers=packs * passes.layers * self.architecture.num_layers / stages)
        work += self._ends(candidate, groups, copies, passes)
        work += self._teacher(candidate, tokens, packs) * passes.teacher
        # Stages wait for the first micro-batch to come and for the last to go.
        bubble = (packs + stages - 1) / packs
        seconds = work.seconds(self.machine, self.machine.train)
        return (seconds + self._tensor_exchange(candidate, tokens, packs, passes.layers)) * bubble

    def _ends(self, candidate: Candidate, groups: Groups, copies: Lengths, passes: Passes) -> Work:
        """Return the work of a rank in the output layer and in the vision tower."""
        layout, workload = candidate.config.parallel, self.workload
        rows = float(groups.responses.sum())
        flops = passes.output * output_flops(self.architecture, rows) / layout.context_parallel_size
        patches = workload.num_patches(self.architecture, float((copies * groups.prompts).sum()))
        media = workload.media_per_question * int(copies.sum())
        flops += passes.tower * tower_flops(self.architecture, patches, max(media, 1))
        return Work(flops / layout.tensor_model_parallel_size)

    def _teacher(self, candidate: Candidate, tokens: float, packs: int) -> Work:
        """Return a rank's work for a teacher's forward pass over the same packs, its output layer
        included.
        """
        layout, teacher = candidate.config.parallel, self.workload.teacher
        parameters = teacher.parameters / layout.tensor_model_parallel_size
        return Work(
            flops=2 * parameters * tokens / layout.context_parallel_size,
            traffic=packs * parameters * self.machine.element_bytes,
            layers=packs * teacher.num_layers,
        )

    def _tensor_exchange(
        self, candidate: Candidate, tokens: float, packs: int, passes: int
    ) -> float:
        """Return the seconds of the all-reduces of the tensor ranks: two in a layer and pass."""
        layout = candidate.config.parallel
        size = layout.tensor_model_parallel_size
        if size == 1:
            return 0.0
        calls = 2 * passes * self.architecture.num_layers / layout.pipeline_model_parallel_size
        moved = tokens / layout.context_parallel_size * self.architecture.hidden_size
        moved *= self.machine.element_bytes * 2 * (size - 1) / size
        return calls * (moved / self.machine.node_bandwidth + packs * self.machine.message_seconds)

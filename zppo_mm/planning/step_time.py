"""The seconds of a step by phase, simulated from the rates of a machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from zppo_mm.config.schema import RunConfig
from zppo_mm.conversion.description import OPTIMIZER_BYTES
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.provider import recomputes_vision
from zppo_mm.planning.decoding import decode_seconds, serve_seconds
from zppo_mm.planning.layouts import Candidate
from zppo_mm.planning.machine import MachineRates
from zppo_mm.planning.operations import (
    Work,
    decode_step,
    forward_flops,
    output_flops,
    tower_flops,
    train_work,
)
from zppo_mm.planning.questions import Groups, QuestionSource, SimulatedStep
from zppo_mm.planning.workload import TeacherAssumption, Workload
from zppo_mm.training.prefix_groups import fill

GRADIENT_BYTES = 4
UPDATE_TRAFFIC = 38
"""Bytes of a parameter that an optimizer step moves: gradient read, weight and moments read and
written, the type's weight written; and the gradient set to zero and read for its norm.
"""


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a step by phase.

    Attributes:
        plain: Plain rollouts, until the last replica has ended.
        teacher: Waiting for the teacher's answers and rewrites.
        reformulated: Rollouts of reformulated prompts.
        update: Forward and backward passes, reduction of the gradients, optimizer.
        sync: Gathering the updated weights.
        save: A checkpoint's copy to host memory, by the steps between two.
    """

    plain: float
    teacher: float
    reformulated: float
    update: float
    sync: float
    save: float

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return float(sum(getattr(self, own.name) for own in fields(self)))


@dataclass(frozen=True, slots=True)
class Simulator:
    """Simulates the steps of a run on a machine.

    Attributes:
        architecture: Of the student.
        machine: Its rates.
        workload: What is assumed.
        steps: What each step samples.
    """

    architecture: Architecture
    machine: MachineRates
    workload: Workload
    steps: tuple[SimulatedStep, ...]

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        config: RunConfig,
        machine: MachineRates,
        workload: Workload,
    ) -> Simulator:
        """Return one with the steps drawn; the first, which has no replay, is left out."""
        source = QuestionSource(config, workload)
        steps = [source.step(number) for number in range(workload.num_steps)]
        return cls(architecture, machine, workload, tuple(steps[1:]))

    def run(self, candidate: Candidate, num_parameters: int) -> StepSeconds:
        """Return the mean seconds of a step.

        Args:
            candidate: A layout that is not refused.
            num_parameters: Of the fullest rank.
        """
        found = [self._step(candidate, step, num_parameters) for step in self.steps]
        return StepSeconds(
            *(
                float(np.mean([getattr(each, own.name) for each in found]))
                for own in fields(StepSeconds)
            )
        )

    def _step(self, candidate: Candidate, step: SimulatedStep, num_parameters: int) -> StepSeconds:
        waves = self._waves(candidate, step.plain)
        ends = np.cumsum([self._sample(candidate, wave) for wave in waves])
        plain = float(ends[-1]) if len(ends) else 0.0
        ready = self._answers(candidate, step, ends.tolist(), waves)
        groups = step.plain.joined(step.reformulated).with_signal()
        update = self._update(candidate, groups, num_parameters)
        num_updates = candidate.config.train.updates_per_step
        weights = num_parameters * self.machine.element_bytes
        state = num_parameters * (OPTIMIZER_BYTES + self.machine.element_bytes)
        interval = candidate.config.checkpoint.interval
        return StepSeconds(
            plain=plain,
            teacher=max(0.0, ready - plain),
            reformulated=self._sample(candidate, step.reformulated),
            update=update,
            sync=num_updates * self._collective(candidate, weights),
            save=state / candidate.num_samplers / self.machine.host_bandwidth / interval,
        )

    def _waves(self, candidate: Candidate, groups: Groups) -> list[Groups]:
        """Return plain groups in the waves after which a teacher elsewhere is asked."""
        size = len(groups)
        if candidate.placement.kind in ("served", "ranks"):
            rollout = candidate.config.rollout
            size = max(1, rollout.max_batch_size // rollout.num_rollouts) * candidate.num_samplers
        bounds = [*range(0, len(groups), max(size, 1)), len(groups)]
        return [groups.part(slice(*pair)) for pair in pairwise(bounds)]

    def _sample(self, candidate: Candidate, groups: Groups) -> float:
        """Return the seconds until the slowest replica has sampled its groups."""
        step = decode_step(self.architecture, candidate.config.parallel, self.machine)
        slowest = 0.0
        for first in range(min(candidate.num_samplers, len(groups))):
            own = groups.part(slice(first, None, candidate.num_samplers))
            seconds = self._prefill(candidate, own) + decode_seconds(
                own.responses.ravel().tolist(),
                np.repeat(own.prompts, own.responses.shape[1]).tolist(),
                candidate.config.rollout.max_batch_size,
                step,
            )
            slowest = max(slowest, seconds)
        return slowest

    def _prefill(self, candidate: Candidate, groups: Groups) -> float:
        """Return a replica's seconds to open media and to pass prompts through the network."""
        prompts, machine = groups.prompts, self.machine
        media = (
            self.workload.media_per_question * len(groups) * (self.architecture.vision is not None)
        )
        patches = self._patches(groups)
        flops = sum(
            forward_flops(self.architecture, tokens, tokens / 2) for tokens in prompts.tolist()
        )
        tensor = candidate.config.parallel.tensor_model_parallel_size
        flops = flops / tensor + tower_flops(self.architecture, patches, max(media, 1)) / tensor
        work = Work(flops, 0.0, self.architecture.num_layers)
        return media / machine.media_per_second + work.seconds(machine, machine.train)

    def _patches(self, groups: Groups) -> float:
        if self.architecture.vision is None or not self.workload.media_per_question:
            return 0.0
        merged = self.architecture.spatial_merge_size**2
        return float(groups.prompts.sum() * self.workload.media_fraction * merged)

    def _answers(
        self, candidate: Candidate, step: SimulatedStep, ends: list[float], waves: list[Groups]
    ) -> float:
        """Return when the teacher's answers and the rewrites after them are there."""
        plain = ends[-1] if ends else 0.0
        if candidate.placement.kind == "none":
            return 0.0
        assumed, at_once, token = self._teacher(candidate)
        bounds = np.cumsum([len(wave) for wave in waves])
        waves_of = np.searchsorted(bounds, step.hard, side="right")
        if candidate.placement.kind == "in turn":
            waves_of = np.full(len(step.hard), len(ends) - 1)
        arrivals = np.repeat(np.array(ends)[waves_of], step.teacher_tokens.shape[1])
        services = assumed.latency_seconds + step.teacher_tokens.ravel() * token
        answered = np.array(serve_seconds(arrivals.tolist(), services.tolist(), at_once))
        awaited = answered[np.repeat(step.is_awaited, step.teacher_tokens.shape[1])]
        start = max(plain, float(awaited.max(initial=0.0)))
        rewrite = assumed.latency_seconds + self.workload.rewrite_tokens * token
        return max(
            [
                start,
                *serve_seconds([start] * step.num_rewrites, [rewrite] * step.num_rewrites, at_once),
            ]
        )

    def _teacher(self, candidate: Candidate) -> tuple[TeacherAssumption, int, float]:
        """Return what is assumed of the teacher, the requests answered at once, and the seconds of
        a token, all of them under way.
        """
        assumed, machine = self.workload.teacher, self.machine
        concurrency = assumed.max_concurrency or candidate.config.teacher.max_concurrency
        gpus = candidate.placement.gpus_per_node
        servers, layer_seconds = candidate.num_nodes, assumed.layer_seconds
        if candidate.placement.kind == "in turn":
            servers, gpus = candidate.num_samplers, candidate.model_ranks
        if candidate.placement.kind != "served":
            layer_seconds = machine.decode.layer_seconds
        rates = machine.decode
        bandwidth = machine.memory_bandwidth * rates.bandwidth_efficiency
        flops = machine.matmul_flops * rates.matmul_efficiency
        weights = assumed.parameters * assumed.element_bytes / gpus / bandwidth
        products = 2 * assumed.parameters * concurrency / gpus / flops
        token = assumed.num_layers * layer_seconds + max(weights, products)
        return assumed, servers * concurrency, token

    def _update(self, candidate: Candidate, groups: Groups, num_parameters: int) -> float:
        """Return the seconds of all updates of a step."""
        train, machine = candidate.config.train, self.machine
        per_update = -(-len(groups) // train.updates_per_step)
        passes = sum(
            self._pass(candidate, groups.part(slice(first, first + per_update)))
            for first in range(0, len(groups), max(per_update, 1))
        )
        reduced = self._collective(candidate, num_parameters * GRADIENT_BYTES)
        shard = num_parameters
        if candidate.config.parallel.use_distributed_optimizer:
            shard //= candidate.num_samplers
        moved = shard * UPDATE_TRAFFIC + 2 * GRADIENT_BYTES * num_parameters
        optimizer = Work(traffic=moved).seconds(machine, machine.train)
        return passes + train.updates_per_step * (reduced + optimizer)

    def _pass(self, candidate: Candidate, groups: Groups) -> float:
        """Return the seconds of one update's passes on the replica that has the most tokens."""
        is_shared = self.machine.shares_prompts and candidate.config.train.share_prompts != "never"
        rollouts = groups.responses.shape[1]
        copies = 1 if is_shared else rollouts
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
        heaviest = groups.part(np.array(replicas[int(totals.argmax())], dtype=np.int64))
        excess = min(float(totals.max()), mean + longest / 2) / max(float(totals.max()), 1.0)
        return self._replica_pass(candidate, heaviest, copies) * excess

    def _replica_pass(self, candidate: Candidate, groups: Groups, copies: int) -> float:
        """Return the seconds of a replica's forward and backward passes."""
        config, machine, layout = candidate.config, self.machine, candidate.config.parallel
        if not len(groups):
            return 0.0
        samples = (groups.responses + groups.prompts[:, None]).ravel()
        tokens = float(groups.responses.sum() + copies * groups.prompts.sum())
        # Samples that share a prompt are shorter by it.
        scale = tokens / float(samples.sum())
        lengths = {index: (int(size * scale),) for index, size in enumerate(samples.tolist())}
        packs = len(fill(lengths, (config.train.micro_batch_tokens,)))
        context = float((samples.astype(float) ** 2).sum() / samples.sum() / 2)
        work = train_work(self.architecture, layout, config.model.recompute, tokens, context)
        stages, context_size = layout.pipeline_model_parallel_size, layout.context_parallel_size
        passes = 4 if config.model.recompute == "full" else 3
        layers = packs * passes * self.architecture.num_layers / stages
        rows = float(groups.responses.sum())
        others = 3 * output_flops(self.architecture, rows) / context_size
        media = self.workload.media_per_question * len(groups)
        tower_passes = (4 if recomputes_vision(config.model) else 3) * copies
        others += tower_passes * tower_flops(
            self.architecture, self._patches(groups), max(media, 1)
        )
        others /= layout.tensor_model_parallel_size
        work = work + Work(others, 0.0, layers)
        # Stages wait for the first micro-batch to come and for the last to go.
        bubble = (packs + stages - 1) / packs
        return (
            work.seconds(machine, machine.train) + self._tensor_exchange(candidate, tokens, packs)
        ) * bubble

    def _tensor_exchange(self, candidate: Candidate, tokens: float, packs: int) -> float:
        """Return the seconds of the all-reduces of the tensor ranks: two in a layer and pass."""
        layout = candidate.config.parallel
        size = layout.tensor_model_parallel_size
        if size == 1:
            return 0.0
        passes = 4 if candidate.config.model.recompute == "full" else 3
        calls = 2 * passes * self.architecture.num_layers / layout.pipeline_model_parallel_size
        moved = tokens / layout.context_parallel_size * self.architecture.hidden_size
        moved *= self.machine.element_bytes * 2 * (size - 1) / size
        return calls * (moved / self.machine.node_bandwidth + packs * self.machine.message_seconds)

    def _collective(self, candidate: Candidate, size: float) -> float:
        """Return the seconds to reduce-scatter or gather some bytes over the replicas."""
        ranks = candidate.num_samplers
        if ranks == 1:
            return 0.0
        machine = self.machine
        inside = candidate.num_nodes == 1
        bandwidth = machine.node_bandwidth if inside else machine.network_bandwidth
        return machine.message_seconds + size * (ranks - 1) / ranks / bandwidth

"""The seconds of a step by phase, simulated from the rates of a machine."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from zppo_mm.config.schema import RunConfig
from zppo_mm.conversion.description import OPTIMIZER_BYTES
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.planning.layouts import Candidate
from zppo_mm.planning.machine import MachineRates
from zppo_mm.planning.questions import Groups, QuestionSource, SimulatedRound, SimulatedStep
from zppo_mm.planning.sampling_time import SamplingTime
from zppo_mm.planning.serving_time import answered_at, teacher_servers
from zppo_mm.planning.update_time import UpdateTime
from zppo_mm.planning.workload import Workload
from zppo_mm.run.records import is_evaluation_due


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of a step by phase.

    Attributes:
        plain: Plain rollouts, until the last replica has ended; of those that are sampled while
            the step before trains, what is left.
        teacher: Waiting for the teacher's answers and rewrites.
        reformulated: Rollouts of reformulated prompts.
        grading: Of all rollouts, by rules and by the judge.
        old_logprobs: The forward pass before the updates, where there is one.
        update: Forward and backward passes, reduction of the gradients, optimizer.
        sync: Gathering the updated weights, and sending them to servers that sample.
        save: A checkpoint's copy to host memory, by the steps between two.
        evaluation: All evaluations of the run, by its steps.
    """

    plain: float
    teacher: float
    reformulated: float
    grading: float
    old_logprobs: float
    update: float
    sync: float
    save: float
    evaluation: float

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return float(sum(getattr(self, own.name) for own in fields(self)))


@dataclass(frozen=True, slots=True)
class RoundSeconds:
    """Seconds of a round, as those of a step."""

    plain: float
    teacher: float
    reformulated: float
    grading: float


@dataclass(frozen=True, slots=True)
class Simulator:
    """Simulates the steps of a run on a machine.

    Attributes:
        architecture: Of the student.
        machine: Its rates.
        workload: What is assumed.
        steps: What each step samples.
        held_out: What an evaluation samples.
    """

    architecture: Architecture
    machine: MachineRates
    workload: Workload
    steps: tuple[SimulatedStep, ...]
    held_out: Groups

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
        return cls(architecture, machine, workload, tuple(steps[1:]), source.held_out())

    @property
    def sampling(self) -> SamplingTime:
        """Return what computes the time of sampling."""
        return SamplingTime(self.architecture, self.machine, self.workload)

    @property
    def updating(self) -> UpdateTime:
        """Return what computes the time of updates."""
        return UpdateTime(self.architecture, self.machine, self.workload)

    def run(self, candidate: Candidate, num_parameters: int) -> StepSeconds:
        """Return the mean seconds of a step.

        Args:
            candidate: A layout that is not refused.
            num_parameters: Of the fullest rank.
        """
        evaluation = self._evaluation(candidate)
        found = [self._step(candidate, step, num_parameters, evaluation) for step in self.steps]
        return StepSeconds(
            *(
                float(np.mean([getattr(each, own.name) for each in found]))
                for own in fields(StepSeconds)
            )
        )

    def _step(
        self, candidate: Candidate, step: SimulatedStep, num_parameters: int, evaluation: float
    ) -> StepSeconds:
        old_logprobs = self.updating.old_logprobs(candidate, step)
        update = self.updating.update(candidate, step.trained, num_parameters)
        ahead = (old_logprobs + update) * candidate.config.rollout.max_staleness
        rounds = [
            self._round(candidate, each, ahead * (each is step.rounds[0])) for each in step.rounds
        ]
        state = num_parameters * (OPTIMIZER_BYTES + self.machine.element_bytes)
        interval = candidate.config.checkpoint.interval
        return StepSeconds(
            plain=sum(each.plain for each in rounds),
            teacher=sum(each.teacher for each in rounds),
            reformulated=sum(each.reformulated for each in rounds),
            grading=sum(each.grading for each in rounds),
            old_logprobs=old_logprobs,
            update=update,
            sync=self._sync(candidate, num_parameters),
            save=state / candidate.num_samplers / self.machine.host_bandwidth / interval,
            evaluation=evaluation,
        )

    def _round(self, candidate: Candidate, step: SimulatedRound, ahead: float) -> RoundSeconds:
        """Return the seconds of a round whose plain rollouts were begun `ahead` seconds before."""
        sampling, mode = self.sampling, candidate.config.reward.judge
        waves = sampling.waves(candidate, step.plain)
        sampled = np.cumsum([sampling.sample(candidate, wave) for wave in waves])
        graded = np.cumsum([sampling.grade(candidate, wave, mode) for wave in waves])
        sampled = np.maximum(sampled - ahead, 0.0)
        ends = (sampled + graded).tolist()
        plain = ends[-1] if ends else 0.0
        ready = plain
        if candidate.placement.kind != "none":
            ready = answered_at(
                candidate,
                step,
                ends,
                np.cumsum([len(wave) for wave in waves]).tolist(),
                teacher_servers(candidate, self.workload, self.machine),
                self.workload.rewrite_tokens,
            )
        again = sampling.grade(candidate, step.reformulated, mode)
        return RoundSeconds(
            plain=float(sampled[-1]) if ends else 0.0,
            teacher=max(0.0, ready - plain),
            reformulated=sampling.sample(candidate, step.reformulated),
            grading=again + (float(graded[-1]) if ends else 0.0),
        )

    def _sync(self, candidate: Candidate, num_parameters: int) -> float:
        """Return the seconds to gather the weights after every update, and of their way to vLLM
        servers: written once and read once, through the host or the network.
        """
        config, machine = candidate.config, self.machine
        weights = num_parameters * machine.element_bytes
        seconds = config.train.updates_per_step * self.updating.collective(candidate, weights)
        if not candidate.num_servers:
            return seconds
        inside = candidate.num_nodes == 1
        bandwidth = machine.host_bandwidth if inside else machine.network_bandwidth
        return seconds + 2 * weights * candidate.model_ranks / bandwidth

    def _evaluation(self, candidate: Candidate) -> float:
        """Return the seconds of all evaluations, divided among the steps."""
        config = candidate.config
        if not len(self.held_out):
            return 0.0
        iters = config.train.train_iters
        # Before the first step, and after those that ask for it.
        count = 1 + sum(
            is_evaluation_due(config.evaluation, iters, step) for step in range(1, iters + 1)
        )
        seconds = self.sampling.sample(candidate, self.held_out)
        seconds += self.sampling.grade(candidate, self.held_out, config.evaluation.judge)
        return seconds * count / iters

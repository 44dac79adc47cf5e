"""What a step is made of, and what it needs of each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from data.question import Question
from zppo_mm.config.schema import DistillConfig, ZoneConfig
from zppo_mm.experience import Advantages, Group
from zppo_mm.interruption import Interruption
from zppo_mm.observability.metrics import StepMetrics
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.sampler import Sampler
from zppo_mm.stages.overlap import Overlap
from zppo_mm.teacher.teacher import Teacher
from zppo_mm.zone.plain_schedule import PlainSchedule
from zppo_mm.zone.reformulate import Reformulator
from zppo_mm.zone.replay import ReplayBuffer
from zppo_mm.zone.selection import Selection


class Feed(Protocol):
    """New questions; `zppo_mm.rollout.feed.QuestionFeed` is one."""

    def take(self, num_questions: int) -> list[Question]:
        """Return the next questions, the same on every rank."""
        ...


class Learner(Protocol):
    """Updates the policy; `zppo_mm.training.learner.Learner` is one."""

    def learn(
        self, groups: Sequence[Group], advantages: Advantages, step: int, metrics: StepMetrics
    ) -> dict[str, tuple[int, ...]]:
        """Make the updates of a step; returns per group uid which update used each rollout."""
        ...


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts of a step. Methods differ in the configuration of these parts alone.

    Attributes:
        seed: The run's seed.
        num_new_questions: New questions per step.
        num_rollouts: Student rollouts per prompt.
        advantage_normalization: Of the advantages in a group.
        zone: What is done about hard questions.
        distill: Whose text is distilled on.
        feed: New questions.
        replay: Hard questions that come back.
        sampler: Samples and verifies with the student's current weights.
        sampling: How the student samples while it trains.
        teacher: Answers questions; `None` when no method in use shows its answers.
        reformulator: Makes reformulated prompts of hard questions.
        selection: Chooses what is trained on.
        learner: Trains on it.
        schedule: Divides plain prompts into waves. The teacher is asked about each wave as soon as
            it is sampled.
        interruption: Drops a step before its update begins; later the step is finished.
        check_grading: Ends the run if grading fails too often; every rank calls it.
        update_weights: Gives an engine that samples elsewhere the trained weights, as those of a
            rollout step; every rank calls it.
        waited: Returns the seconds that this rank has waited for other replicas so far.
        overlap: Starts the plain rollouts of the next step before the update; `None` samples them
            in their own step.
    """

    seed: int
    num_new_questions: int
    num_rollouts: int
    advantage_normalization: str
    zone: ZoneConfig
    distill: DistillConfig
    feed: Feed
    replay: ReplayBuffer
    sampler: Sampler
    sampling: SamplingParams
    teacher: Teacher | None
    reformulator: Reformulator
    selection: Selection
    learner: Learner
    schedule: PlainSchedule
    interruption: Interruption = field(default_factory=Interruption)
    check_grading: Callable[[], None] = lambda: None
    update_weights: Callable[[int], None] = lambda version: None
    waited: Callable[[], float] = lambda: 0.0
    overlap: Overlap | None = None

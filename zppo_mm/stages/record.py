"""What a step decided and measured, for transcripts and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zppo_mm.experience import Advantages, BufferUpdate, Group
from zppo_mm.observability.metrics import Max, StepMetrics, Sum
from zppo_mm.observability.rank_times import PhaseMetrics
from zppo_mm.observability.rollout_metrics import (
    buffer_metrics,
    group_metrics,
    sampling_speed,
    selection_metrics,
    teacher_metrics,
)
from zppo_mm.stages.round import Round
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.zone.reformulate import TeacherAnswers, composition
from zppo_mm.zone.replay import ReplayBuffer
from zppo_mm.zone.selection import Selected


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything that a step decided, from which transcripts and metrics are written.

    Attributes:
        step: Rollout step, from 1.
        groups: Plain and reformulated groups as sampled, then those that were made to be trained
            on.
        advantages: Per uid of a group that was trained on, one per rollout.
        minibatches: Per uid of a group that was trained on, the update that used each rollout.
        teacher_rewards: Rewards of the teacher's rollouts by question id; nothing for questions
            that it was not asked.
        buffer: What the step did to the replay buffer.
        metrics: Measurements of the step.
        teacher_lost: Why answers that only the record needs are missing from it. The step is
            complete without them, but the run is not to go on.
    """

    step: int
    groups: tuple[Group, ...]
    advantages: Advantages
    minibatches: dict[str, tuple[int, ...]]
    teacher_rewards: dict[str, tuple[float, ...]]
    buffer: BufferUpdate
    metrics: PhaseMetrics
    teacher_lost: TeacherLostError | None = None


def all_answers(rounds: Sequence[Round]) -> TeacherAnswers:
    """Return the teacher's answers to the questions of all rounds."""
    return {
        question_id: rollouts
        for each in rounds
        for question_id, rollouts in each.pending.answers.items()
    }


def drain_answers(rounds: Sequence[Round], metrics: StepMetrics) -> TeacherLostError | None:
    """Wait for the answers that only the record needs, which had the time of the update to arrive,
    and measure all answers; returns the first of the teacher's errors.
    """
    with metrics.phase("teacher"):
        errors = [error for each in rounds for error in each.pending.drain()]
    for each in rounds:
        if each.pending.seconds is not None:
            metrics.add("teacher/answer_seconds", Max(each.pending.seconds))
            metrics.merge(teacher_metrics(list(each.pending.answers.values())))
    return errors[0] if errors else None


def recorded_groups(rounds: Sequence[Round], selected: Selected) -> tuple[Group, ...]:
    """Return all groups of a step, each once."""
    sampled = [group for each in rounds for group in each.groups]
    return tuple({group.uid: group for group in [*sampled, *selected.groups]}.values())


def teacher_rewards(rounds: Sequence[Round]) -> dict[str, tuple[float, ...]]:
    """Return the rewards of the teacher's rollouts by question id."""
    return {
        question_id: tuple(rollout.reward for rollout in rollouts)
        for question_id, rollouts in all_answers(rounds).items()
    }


def measure_step(
    rounds: Sequence[Round],
    selected: Selected,
    advantages: Advantages,
    replay: ReplayBuffer,
    tau: float,
    metrics: StepMetrics,
) -> None:
    """Add what the groups, the selection, the prompts and the buffer of a step show."""
    groups = [group for each in rounds for group in each.groups]
    metrics.merge(group_metrics(groups, tau))
    metrics.add("rollout/failed_groups", Sum(selected.num_failed))
    metrics.merge(
        selection_metrics(selected, {uid: values.tolist() for uid, values in advantages.items()})
    )
    metrics.add("batch/sampling_rounds", Sum(len(rounds)))
    mix = composition(groups, all_answers(rounds), tau)
    metrics.add("batch/bcq_eligible", Sum(mix.num_bcq_eligible))
    metrics.add("batch/ncq_eligible", Sum(mix.num_ncq_eligible))
    for each in rounds:
        made = each.reformulated
        metrics.add("teacher/compression_rejects", Sum(made.num_compression_rejects))
        metrics.add("teacher/compression_cuts", Sum(made.num_compression_cuts))
        metrics.add("teacher/hint_rejects", Sum(made.num_hint_rejects))
        metrics.add("teacher/hint_failures", Sum(made.num_hint_failures))
    metrics.merge(buffer_metrics(replay.occupancy(), replay.fates))
    metrics.merge(sampling_speed(groups, metrics))

"""One ZPPO step: sample, ask the teacher, reformulate, sample again, update the
weights and the buffer.

A baseline is another configuration of these stages, never another loop. Source: ZPPO (arXiv
2606.18216), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from zppo_mm.algorithms.advantages import group_advantages
from zppo_mm.experience import Advantages, Group
from zppo_mm.observability.metrics import StepMetrics
from zppo_mm.observability.rank_times import PhaseMetrics
from zppo_mm.stages.ahead import complete_step, start_next, sync_weights
from zppo_mm.stages.overlap import Ahead
from zppo_mm.stages.record import (
    StepRecord,
    all_answers,
    drain_answers,
    measure_step,
    recorded_groups,
    teacher_rewards,
)
from zppo_mm.stages.round import (
    Round,
    hard_groups,
    plain_prompts,
    sample_plain,
    sample_reformulated,
    take_questions,
    update_buffer,
)
from zppo_mm.stages.stages import Stages
from zppo_mm.teacher.pending_answers import PendingAnswers
from zppo_mm.zone.selection import Selected


def run_step(stages: Stages, step: int) -> StepRecord:
    """Run one rollout step and its I gradient updates.

    Args:
        stages: The parts, kept over the run.
        step: From 1; names all random draws of the step.

    Raises:
        TeacherLostError: On every rank, before anything but the stream was moved, if the teacher
            does not answer.
        GradingError: The same, if grading fails too often.
        RolloutServersLostError: The same, if no server samples any more.
        StopRequested: The same, if the run is to end.
    """
    metrics = PhaseMetrics(stages.waited, torch.profiler.record_function)
    ahead = sync_weights(stages, step, metrics)
    rounds = [sample_round(stages, (), step, metrics, ahead)]
    selected = select_groups(stages, rounds, step, metrics)
    while needs_another_round(stages, rounds, selected):
        rounds.append(sample_round(stages, rounds, step, metrics))
        selected = select_groups(stages, rounds, step, metrics)
    with metrics.phase("teacher"):
        for each in rounds:
            # A further teacher that is asked now can answer during the update.
            each.pending.poll()
    stages.check_grading()
    start_next(stages, rounds, step, metrics)

    advantages = advantages_by_uid(selected.groups, stages.advantage_normalization)
    # Nothing was changed so far. From here on the step is finished, whatever is asked of the run.
    with stages.interruption.held():
        minibatches = stages.learner.learn(selected.groups, advantages, step, metrics)
        buffer = update_buffer(stages.replay, stages.zone, rounds, step)
        teacher_lost = drain_answers(rounds, metrics)
        complete_step(stages, rounds, step, metrics)

    measure_step(rounds, selected, advantages, stages.replay, stages.zone.tau, metrics)
    return StepRecord(
        step=step,
        groups=recorded_groups(rounds, selected),
        advantages=advantages,
        minibatches=minibatches,
        teacher_rewards=teacher_rewards(rounds),
        buffer=buffer,
        metrics=metrics,
        teacher_lost=teacher_lost,
    )


def sample_round(
    stages: Stages,
    earlier: Sequence[Round],
    step: int,
    metrics: StepMetrics,
    ahead: Ahead | None = None,
) -> Round:
    """Take questions, sample plain groups, reformulate hard questions and sample again.

    A question that an earlier round had is sampled again. The teacher is not asked about it again,
    and it is not reformulated again.

    Args:
        stages: The parts.
        earlier: Rounds of the step so far.
        step: Rollout step.
        metrics: Of the step.
        ahead: The plain part of the round, if it was started before the step.
    """
    with metrics.phase("data"):
        new, replayed = (
            take_questions(stages, earlier, step) if ahead is None else (ahead.new, ahead.replayed)
        )
    known = {question.id for each in earlier for question in each.questions}
    pending = PendingAnswers(stages.teacher, step, known)
    if stages.distill.source == "teacher":
        with metrics.phase("teacher"):
            pending.submit([*new, *replayed])
    first = len(earlier) * stages.num_new_questions
    plain = plain_prompts(stages, new, replayed, step, first)
    groups = sample_plain(stages, plain, known, pending, step, metrics, ahead)
    hard = hard_groups(stages, groups, known)
    reformulated, sampled = sample_reformulated(stages, hard, pending, step, metrics)
    return Round((*new, *replayed), (*groups, *sampled), pending, reformulated)


def select_groups(
    stages: Stages, rounds: Sequence[Round], step: int, metrics: StepMetrics
) -> Selected:
    """Choose what is trained on among all groups of the rounds."""
    if stages.selection.needs_answers:
        with metrics.phase("teacher"):
            for each in rounds:
                each.pending.wait_for(each.pending.awaited)
    groups = [group for each in rounds for group in each.groups]
    questions = [question for each in rounds for question in each.questions]
    return stages.selection.choose(groups, questions, all_answers(rounds), step)


def needs_another_round(stages: Stages, rounds: Sequence[Round], selected: Selected) -> bool:
    """Return whether dynamic sampling takes further questions, because too few have a group from
    which something can be learned.

    A question counts as often as it was asked plainly, or a data set smaller than a step would
    never have enough.
    """
    if len(rounds) >= stages.zone.max_sampling_rounds:
        return False
    num_useful = sum(group.is_plain or group.kind == "inject" for group in selected.groups)
    return num_useful < stages.num_new_questions


def advantages_by_uid(groups: Sequence[Group], normalization: str) -> Advantages:
    """Return one advantage per rollout, by group uid."""
    rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
    values = group_advantages(rewards, normalization) if groups else []
    return {
        group.uid: value.numpy().astype(np.float32)
        for group, value in zip(groups, values, strict=True)
    }

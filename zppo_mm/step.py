"""One ZPPO step, told as a story: sample, ask the teacher, reformulate, sample again, update the
weights and the buffer.

A baseline is another configuration of these stages, never another loop. Source: ZPPO (arXiv
2606.18216), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.question import Question, check_same_question
from zppo_mm.algorithms.advantages import group_advantages
from zppo_mm.config.schema import RunConfig
from zppo_mm.experience import FloatArray, Group, GroupKind, PromptInstance
from zppo_mm.interruption import Interruption
from zppo_mm.observability.metrics import Max, StepMetrics, Sum
from zppo_mm.observability.rollout_metrics import (
    buffer_metrics,
    group_metrics,
    sampling_speed,
    selection_metrics,
    teacher_metrics,
)
from zppo_mm.randomness import generator
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.rollout.soundness import NOT_FINITE
from zppo_mm.teacher.pending_answers import PendingAnswers
from zppo_mm.teacher.teacher import Teacher, TeacherLostError
from zppo_mm.training.learner import Learner
from zppo_mm.zone.hard import count_of_fraction, select_hard
from zppo_mm.zone.plain_schedule import PlainSchedule
from zppo_mm.zone.reformulate import Reformulation, Reformulator, TeacherAnswers, composition
from zppo_mm.zone.replay import ReplayBuffer
from zppo_mm.zone.selection import Selected, Selection


@dataclass(frozen=True, slots=True)
class Stages:
    """What a step is made of; the methods differ in the configuration alone.

    Attributes:
        config: The run.
        feed: New questions, checked.
        replay: Hard questions that come back.
        sampler: Samples and verifies with the student's current weights.
        sampling: How the student samples while it trains.
        teacher: Answers questions; `None` when no method in use shows its answers.
        reformulator: Makes reformulated prompts of hard questions.
        selection: Chooses what is trained on.
        learner: Trains on it.
        schedule: Divides plain prompts into waves; the teacher is asked about each as soon as it is
            sampled.
        interruption: Drops a step before its update begins; later the step is finished.
    """

    config: RunConfig
    feed: QuestionFeed
    replay: ReplayBuffer
    sampler: GroupSampler
    sampling: SamplingParams
    teacher: Teacher | None
    reformulator: Reformulator
    selection: Selection
    learner: Learner
    schedule: PlainSchedule
    interruption: Interruption = field(default_factory=Interruption)


@dataclass(frozen=True, slots=True)
class BufferChange:
    """Question ids that a step admitted, graduated and evicted, and the whole buffer after it,
    oldest admission first.
    """

    admitted: tuple[str, ...]
    graduated: tuple[str, ...]
    evicted: tuple[str, ...]
    content: tuple[str, ...]


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
        buffer_change: What the step did to the replay buffer.
        metrics: Measurements of the step.
        teacher_lost: Why answers that nothing but the records was waiting for are missing from
            them. The step is complete without, the run is not to go on.
    """

    step: int
    groups: tuple[Group, ...]
    advantages: dict[str, FloatArray]
    minibatches: dict[str, tuple[int, ...]]
    teacher_rewards: dict[str, tuple[float, ...]]
    buffer_change: BufferChange
    metrics: StepMetrics
    teacher_lost: TeacherLostError | None = None


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round of questions brought: once per step, or more often under dynamic sampling."""

    questions: tuple[Question, ...]
    groups: tuple[Group, ...]
    pending: PendingAnswers
    reformulated: Reformulation


def run_step(stages: Stages, step: int) -> StepRecord:
    """Run one rollout step and its I gradient updates.

    Args:
        stages: The parts, kept over the run.
        step: From 1; names all random draws of the step.

    Raises:
        TeacherLostError: On every rank, before anything but the stream was moved, if the teacher
            does not answer.
        StopRequested: The same, if the run is to end.
    """
    metrics = StepMetrics()
    rounds = [_sample_round(stages, step, (), metrics)]
    selected = _select(stages, rounds, step, metrics)
    while _wants_more(stages, len(rounds), selected):
        rounds.append(_sample_round(stages, step, rounds, metrics))
        selected = _select(stages, rounds, step, metrics)
    groups = [group for each in rounds for group in each.groups]

    with metrics.phase("teacher"):
        for each in rounds:
            # Who is asked next, where several teachers are, can answer during the update.
            each.pending.poll()
    metrics.add("rollout/failed_groups", Sum(selected.num_failed))
    advantages = _advantages(selected.groups, stages.config.algorithm.advantage_normalization)
    with stages.interruption.held():
        minibatches = stages.learner.learn(selected.groups, advantages, step, metrics)
        buffer_change = _update_buffer(stages, groups, step)
        teacher_lost = _hear_the_rest(rounds, metrics)

    answers = _all_answers(rounds)
    _measure(
        stages,
        groups,
        selected,
        advantages,
        [each.reformulated for each in rounds],
        answers,
        metrics,
    )
    metrics.add("batch/sampling_rounds", Sum(len(rounds)))
    teacher_rewards = {
        question_id: tuple(rollout.reward for rollout in rollouts)
        for question_id, rollouts in answers.items()
    }
    recorded = {group.uid: group for group in [*groups, *selected.groups]}
    return StepRecord(
        step,
        tuple(recorded.values()),
        advantages,
        minibatches,
        teacher_rewards,
        buffer_change,
        metrics,
        teacher_lost,
    )


def _sample_round(
    stages: Stages, step: int, earlier: Sequence[_Round], metrics: StepMetrics
) -> _Round:
    """Take questions, sample plain groups, hear the teacher, reformulate and sample again.

    Args:
        stages: The parts.
        step: Rollout step.
        earlier: Rounds of the step so far; replayed questions come in the first. A question that
            comes once more is sampled again, but the teacher is not asked about it again, and it is
            not reformulated again.
        metrics: Of the step.
    """
    met = [question for each in earlier for question in each.questions]
    asked_before = {question.id for question in met}
    num_new = stages.config.train.num_new_questions
    with metrics.phase("data"):
        new = stages.feed.take(num_new)
        replayed = _draw_replayed(stages, new, step) if not earlier else []
        _check_ids([*met, *new, *replayed])
    pending = PendingAnswers(stages.teacher, step, asked_before)
    if stages.config.distill.source == "teacher":
        with metrics.phase("teacher"):
            pending.submit([*new, *replayed])
    plain = [
        *_plain_instances(stages, "new", new, step, len(earlier) * num_new),
        *_plain_instances(stages, "replayed", replayed, step, 0),
    ]
    groups = _sample_plain(stages, plain, pending, step, metrics)

    hard = [
        group
        for group in select_hard(groups, stages.config.zone.tau)
        if group.question.id not in asked_before
    ]
    reformulated, sampled = _sample_guided(stages, hard, pending, step, metrics)
    return _Round(
        (*new, *replayed),
        (*groups, *_in_order(sampled, reformulated.instances)),
        pending,
        reformulated,
    )


def _wants_more(stages: Stages, num_rounds: int, selected: Selected) -> bool:
    """Return whether dynamic sampling takes further questions: too few have a group from which
    something can be learned.

    A question counts as often as it was asked plainly, or a data set smaller than a step would
    never have enough.
    """
    if num_rounds >= stages.config.zone.max_sampling_rounds:
        return False
    return (
        sum(group.is_plain or group.kind == "inject" for group in selected.groups)
        < stages.config.train.num_new_questions
    )


def _select(stages: Stages, rounds: Sequence[_Round], step: int, metrics: StepMetrics) -> Selected:
    """Choose what is trained on among all that the rounds brought."""
    if stages.selection.needs_answers:
        with metrics.phase("teacher"):
            for each in rounds:
                each.pending.wait_for(each.pending.awaited)
    groups = [group for each in rounds for group in each.groups]
    questions = [question for each in rounds for question in each.questions]
    return stages.selection.choose(groups, questions, _all_answers(rounds), step)


def _all_answers(rounds: Sequence[_Round]) -> TeacherAnswers:
    return {
        question_id: rollouts
        for each in rounds
        for question_id, rollouts in each.pending.answers.items()
    }


def _hear_the_rest(rounds: Sequence[_Round], metrics: StepMetrics) -> TeacherLostError | None:
    """Wait for the answers that changed nothing, which had the time of the update to arrive, and
    measure what was answered.
    """
    with metrics.phase("teacher"):
        errors = [error for each in rounds for error in each.pending.drain()]
    for each in rounds:
        if each.pending.seconds is not None:
            metrics.add("teacher/answer_seconds", Max(each.pending.seconds))
            metrics.merge(teacher_metrics(list(each.pending.answers.values())))
    return errors[0] if errors else None


def _draw_replayed(stages: Stages, new: Sequence[Question], step: int) -> list[Question]:
    """Draw replayed questions; one that is new in this step anyway is not asked twice."""
    config = stages.config
    count = count_of_fraction(config.zone.rho_replay, len(new)) if config.zone.replay else 0
    return stages.replay.draw(
        count, generator(config.seed, "replay", step), exclude={question.id for question in new}
    )


def _check_ids(questions: Sequence[Question]) -> None:
    """Refuse different questions under one id: replay, the teacher's answers and reformulation go
    by the id.
    """
    first: dict[str, Question] = {}
    for question in questions:
        check_same_question(first.setdefault(question.id, question), question)


def _plain_instances(
    stages: Stages, kind: GroupKind, questions: Sequence[Question], step: int, first: int
) -> list[PromptInstance]:
    # A data set smaller than a step brings a question twice into it; its place keeps the uids
    # apart.
    return [
        PromptInstance(
            f"{step}/{kind}/{place}/{question.id}",
            question,
            kind,
            stages.reformulator.templates.plain_text(question),
        )
        for place, question in enumerate(questions, first)
    ]


def _sample_plain(
    stages: Stages,
    instances: Sequence[PromptInstance],
    pending: PendingAnswers,
    step: int,
    metrics: StepMetrics,
) -> list[Group]:
    """Sample plain groups, part by part where the teacher answers meanwhile: it is asked what was
    hard in each at once.

    Without a buffer, distillation on the teacher's text has no use for them.
    """
    config = stages.config
    if config.distill.source == "teacher" and not config.zone.replay:
        return []
    groups: list[Group] = []
    for wave in stages.schedule.waves(instances, step):
        with metrics.phase("plain_rollout"):
            sampled = _sample(stages, wave, step, metrics)
        with metrics.phase("teacher"):
            pending.submit([group.question for group in select_hard(sampled, config.zone.tau)])
        groups += sampled
    return _in_order(groups, instances)


def _sample_guided(
    stages: Stages, hard: Sequence[Group], pending: PendingAnswers, step: int, metrics: StepMetrics
) -> tuple[Reformulation, list[Group]]:
    """Reformulate and sample again: at once what stands whatever is answered later, the rest as
    answers come in.

    Answers that can add no prompt any more are not waited for.
    """
    reformulated = Reformulation()
    sampled: list[Group] = []
    while True:
        with metrics.phase("teacher"):
            pending.poll()
            there = {instance.uid for instance in reformulated.instances}
            reformulated = stages.reformulator.reformulate(
                hard,
                pending.answers,
                step,
                stages.config.train.num_new_questions,
                reformulated,
                pending.awaited,
            )
        fresh = [instance for instance in reformulated.instances if instance.uid not in there]
        if fresh:
            with metrics.phase("reformulated_rollout"):
                sampled += _sample(stages, fresh, step, metrics)
        if not reformulated.awaited:
            return reformulated, sampled
        if not fresh:
            with metrics.phase("teacher"):
                # With this answer others may not be needed any more.
                pending.wait_for(reformulated.awaited[:1])


def _in_order(groups: Sequence[Group], instances: Sequence[PromptInstance]) -> list[Group]:
    """Return groups in the order of their instances."""
    places = {instance.uid: place for place, instance in enumerate(instances)}
    return sorted(groups, key=lambda group: places[group.uid])


def _sample(
    stages: Stages, instances: Sequence[PromptInstance], step: int, metrics: StepMetrics
) -> list[Group]:
    """Generate and verify; what could not be sampled is counted."""
    groups = stages.sampler.sample(
        instances, stages.sampling, stages.config.rollout.num_rollouts, step
    )
    metrics.add("rollout/failed_groups", Sum(len(instances) - len(groups)))
    metrics.add(
        "rollout/not_finite_groups",
        Sum(sum(reason == NOT_FINITE for reason in stages.sampler.failed.values())),
    )
    return groups


def _advantages(groups: Sequence[Group], normalization: str) -> dict[str, FloatArray]:
    rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
    values = group_advantages(rewards, normalization) if groups else []
    return {
        group.uid: value.numpy().astype(np.float32)
        for group, value in zip(groups, values, strict=True)
    }


def _update_buffer(stages: Stages, groups: Sequence[Group], step: int) -> BufferChange:
    """Admit, graduate and evict; without replay nothing is hard enough to be admitted."""
    zone = stages.config.zone
    update = stages.replay.update(groups, zone.tau if zone.replay else 0.0, step)
    return BufferChange(
        update.admitted, update.graduated, update.evicted, tuple(stages.replay.content())
    )


def _measure(
    stages: Stages,
    groups: Sequence[Group],
    selected: Selected,
    advantages: dict[str, FloatArray],
    reformulated: Sequence[Reformulation],
    answers: TeacherAnswers,
    metrics: StepMetrics,
) -> None:
    tau = stages.config.zone.tau
    metrics.merge(group_metrics(groups, tau))
    metrics.merge(
        selection_metrics(selected, {uid: values.tolist() for uid, values in advantages.items()})
    )
    mix = composition(groups, answers, tau)
    metrics.add("batch/bcq_eligible", Sum(mix.num_bcq_eligible))
    metrics.add("batch/ncq_eligible", Sum(mix.num_ncq_eligible))
    for each in reformulated:
        metrics.add("teacher/compression_rejects", Sum(each.num_compression_rejects))
        metrics.add("teacher/compression_cuts", Sum(each.num_compression_cuts))
        metrics.add("teacher/hint_rejects", Sum(each.num_hint_rejects))
        metrics.add("teacher/hint_failures", Sum(each.num_hint_failures))
    metrics.merge(buffer_metrics(stages.replay.occupancy(), stages.replay.fates))
    metrics.merge(sampling_speed(groups, metrics))

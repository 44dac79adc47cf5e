"""One ZPPO step, told as a story: sample, ask the teacher, reformulate, sample again, update the weights and the buffer.

A baseline is another configuration of these stages, never another loop. Source: ZPPO (arXiv 2606.18216), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.question import Question, check_same_question
from zppo_mm.algorithms.advantages import group_advantages
from zppo_mm.config import RunConfig
from zppo_mm.experience import FloatArray, Group, GroupKind, PromptInstance
from zppo_mm.observability.metrics import Max, StepMetrics, Sum
from zppo_mm.observability.rollout_metrics import buffer_metrics, group_metrics, sampling_speed, teacher_metrics
from zppo_mm.randomness import generator
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.teacher.teacher import Answers, Teacher
from zppo_mm.training.learner import Learner
from zppo_mm.zone.hard import count_of_share, select_hard
from zppo_mm.zone.reformulate import Reformulation, Reformulator, TeacherAnswers, composition
from zppo_mm.zone.replay import ReplayBuffer


@dataclass(frozen=True, slots=True)
class Stages:
    """What a step is made of; the methods differ in the configuration alone.

    Attributes:
        config: The run.
        feed: New questions, checked.
        replay: Hard questions that come back.
        sampler: Samples and verifies with the student's current weights.
        sampling: How the student samples while it trains.
        teacher: Answers hard questions; `None` when no method in use shows its answers.
        reformulator: Makes BCQ and NCQ prompts.
        learner: Trains on what was sampled.
    """

    config: RunConfig
    feed: QuestionFeed
    replay: ReplayBuffer
    sampler: GroupSampler
    sampling: SamplingParams
    teacher: Teacher | None
    reformulator: Reformulator
    learner: Learner


@dataclass(frozen=True, slots=True)
class BufferChange:
    """Question ids that a step admitted, graduated and evicted, and the whole buffer after it, oldest admission first."""

    admitted: tuple[str, ...]
    graduated: tuple[str, ...]
    evicted: tuple[str, ...]
    content: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything that a step decided, from which transcripts and metrics are written.

    Attributes:
        step: Rollout step, from 1.
        groups: Plain, BCQ and NCQ groups.
        advantages: Per group uid, one per rollout.
        minibatches: Per group uid, the update that used each rollout.
        teacher_rewards: Rewards of the teacher's rollouts by question id; nothing for questions that it was not asked.
        buffer_change: What the step did to the replay buffer.
        metrics: Measurements of the step.
    """

    step: int
    groups: tuple[Group, ...]
    advantages: dict[str, FloatArray]
    minibatches: dict[str, tuple[int, ...]]
    teacher_rewards: dict[str, tuple[float, ...]]
    buffer_change: BufferChange
    metrics: StepMetrics


def run_step(stages: Stages, step: int) -> StepRecord:
    """Run one rollout step and its I gradient updates.

    Args:
        stages: The parts, kept over the run.
        step: From 1; names all random draws of the step.
    """
    config, metrics = stages.config, StepMetrics()
    num_new = config.train.num_new_questions

    with metrics.phase("data"):
        new = stages.feed.take(num_new)
        replayed = _draw_replayed(stages, new, step)
        _check_ids([*new, *replayed])
    with metrics.phase("plain_rollout"):
        plain = [*_plain_instances(stages, "new", new, step), *_plain_instances(stages, "replayed", replayed, step)]
        groups = _sample(stages, plain, step, metrics)

    hard = select_hard(groups, config.zone.tau)
    with metrics.phase("teacher"):
        asked = _ask_teacher(stages, hard, step)
        early = stages.reformulator.certain_ncq(hard, step, num_new) if asked and asked.is_pending else Reformulation()
    with metrics.phase("reformulated_rollout"):
        sampled = _sample(stages, early.instances, step, metrics) if early.instances else []  # while the teacher answers
    with metrics.phase("teacher"):
        answers = _hear_teacher(asked, metrics)
        guided = stages.reformulator.reformulate(hard, answers, step, num_new, early)
    with metrics.phase("reformulated_rollout"):
        sampled += _sample(stages, [each for each in guided.instances if each not in early.instances], step, metrics)
    places = {instance.uid: place for place, instance in enumerate(guided.instances)}
    groups += sorted(sampled, key=lambda group: places[group.uid])

    advantages = _advantages(groups, config.algorithm.advantage_normalization)
    with metrics.phase("update"):
        minibatches = stages.learner.learn(groups, advantages, step, metrics)
    buffer_change = _update_buffer(stages, groups, step)

    _measure(stages, groups, advantages, answers, guided, metrics)
    teacher_rewards = {question_id: tuple(rollout.reward for rollout in rollouts) for question_id, rollouts in answers.items()}
    return StepRecord(step, tuple(groups), advantages, minibatches, teacher_rewards, buffer_change, metrics)


def _draw_replayed(stages: Stages, new: Sequence[Question], step: int) -> list[Question]:
    """Draw replayed questions; one that is new in this step anyway is not asked twice."""
    config = stages.config
    count = count_of_share(config.zone.rho_replay, len(new)) if config.zone.replay else 0
    return stages.replay.draw(count, generator(config.seed, "replay", step), exclude={question.id for question in new})


def _check_ids(questions: Sequence[Question]) -> None:
    """Refuse different questions under one id: replay, the teacher's answers and reformulation go by the id."""
    first: dict[str, Question] = {}
    for question in questions:
        check_same_question(first.setdefault(question.id, question), question)


def _plain_instances(stages: Stages, kind: GroupKind, questions: Sequence[Question], step: int) -> list[PromptInstance]:
    # A data set smaller than a step brings a question twice into it; its place keeps the uids apart.
    return [
        PromptInstance(f"{step}/{kind}/{place}/{question.id}", question, kind, stages.reformulator.templates.plain_text(question))
        for place, question in enumerate(questions)
    ]


def _sample(stages: Stages, instances: Sequence[PromptInstance], step: int, metrics: StepMetrics) -> list[Group]:
    """Generate and verify; what could not be sampled is counted."""
    groups = stages.sampler.sample(instances, stages.sampling, stages.config.rollout.num_rollouts, step)
    metrics.add("rollout/failed_groups", Sum(len(instances) - len(groups)))
    return groups


def _ask_teacher(stages: Stages, hard: Sequence[Group], step: int) -> Answers | None:
    """Ask every hard question once, in its original form."""
    questions = list({group.question.id: group.question for group in hard}.values())
    return stages.teacher.ask(questions, step) if stages.teacher is not None and questions else None


def _hear_teacher(asked: Answers | None, metrics: StepMetrics) -> TeacherAnswers:
    """Wait for the answers that are not there yet."""
    if asked is None:
        return {}
    answers = asked.wait()
    metrics.add("teacher/answer_seconds", Max(asked.seconds))
    metrics.merge(teacher_metrics(list(answers.values())))
    return answers


def _advantages(groups: Sequence[Group], normalization: str) -> dict[str, FloatArray]:
    rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
    values = group_advantages(rewards, normalization) if groups else []
    return {group.uid: value.numpy().astype(np.float32) for group, value in zip(groups, values, strict=True)}


def _update_buffer(stages: Stages, groups: Sequence[Group], step: int) -> BufferChange:
    """Admit, graduate and evict; without replay nothing is hard enough to be admitted."""
    zone = stages.config.zone
    update = stages.replay.update(groups, zone.tau if zone.replay else 0.0, step)
    return BufferChange(update.admitted, update.graduated, update.evicted, tuple(stages.replay.content()))


def _measure(
    stages: Stages,
    groups: Sequence[Group],
    advantages: dict[str, FloatArray],
    answers: TeacherAnswers,
    guided: Reformulation,
    metrics: StepMetrics,
) -> None:
    tau = stages.config.zone.tau
    metrics.merge(group_metrics(groups, {uid: values.tolist() for uid, values in advantages.items()}, tau))
    mix = composition(groups, answers, tau)
    metrics.add("batch/bcq_eligible", Sum(mix.num_bcq_eligible))
    metrics.add("batch/ncq_eligible", Sum(mix.num_ncq_eligible))
    metrics.add("teacher/compression_rejects", Sum(guided.num_compression_rejects))
    metrics.add("teacher/compression_cuts", Sum(guided.num_compression_cuts))
    metrics.merge(buffer_metrics(stages.replay.occupancy(), stages.replay.fates))
    metrics.merge(sampling_speed(groups, metrics))

"""The parts of one sampling round: questions, plain groups, reformulated groups."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from data.question import Question, check_same_question
from zppo_mm.experience import Group, GroupKind, PromptInstance
from zppo_mm.observability.metrics import StepMetrics, Sum
from zppo_mm.randomness import generator
from zppo_mm.rollout.soundness import NO_ROOM, NOT_FINITE
from zppo_mm.stages.stages import Stages
from zppo_mm.teacher.pending_answers import PendingAnswers
from zppo_mm.zone.hard import count_of_fraction, select_hard
from zppo_mm.zone.reformulate import Reformulation


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of questions brought: one per step, more under dynamic sampling.

    Attributes:
        questions: New and replayed ones.
        groups: Plain and reformulated ones.
        pending: The teacher's answers.
        reformulated: Prompts made of hard questions.
    """

    questions: tuple[Question, ...]
    groups: tuple[Group, ...]
    pending: PendingAnswers
    reformulated: Reformulation


def take_questions(
    stages: Stages, earlier: Sequence[Round], step: int
) -> tuple[list[Question], list[Question]]:
    """Return new and replayed questions; replayed ones come in the first round.

    Raises:
        DataError: Two different questions of the step have the same id, by which replay, the
            teacher's answers and reformulation find them.

    Source: ZPPO, Algorithm 1, step 1.
    """
    zone = stages.zone
    new = stages.feed.take(stages.num_new_questions)
    replayed: list[Question] = []
    if zone.replay and not earlier:
        # One that is new in this step anyway is not asked twice.
        replayed = stages.replay.draw(
            count_of_fraction(zone.rho_replay, len(new)),
            generator(stages.seed, "replay", step),
            exclude={question.id for question in new},
        )
    first: dict[str, Question] = {}
    for question in [*(each for one in earlier for each in one.questions), *new, *replayed]:
        check_same_question(first.setdefault(question.id, question), question)
    return new, replayed


def plain_instances(
    stages: Stages, kind: GroupKind, questions: Sequence[Question], step: int, first: int
) -> list[PromptInstance]:
    """Return plain prompts.

    Args:
        stages: The parts.
        kind: `new` or `replayed`.
        questions: To be asked.
        step: Rollout step.
        first: Index of the first question among those of its kind in the step.
    """
    # A data set smaller than a step brings a question twice into it; the index keeps the uids
    # apart.
    return [
        PromptInstance(
            f"{step}/{kind}/{index}/{question.id}",
            question,
            kind,
            stages.reformulator.templates.plain_text(question),
        )
        for index, question in enumerate(questions, first)
    ]


def sample_plain(
    stages: Stages,
    instances: Sequence[PromptInstance],
    known: Collection[str],
    pending: PendingAnswers,
    step: int,
    metrics: StepMetrics,
) -> list[Group]:
    """Sample plain groups in waves, and ask the teacher about hard questions after each: about all,
    or where only those that the pre-cap keeps are to be asked, about those that it is certain to
    keep.

    Without a buffer, distillation on the teacher's text has no use for plain groups.

    Args:
        stages: The parts.
        instances: Plain prompts.
        known: Ids of questions of earlier rounds.
        pending: The teacher's answers.
        step: Rollout step.
        metrics: Of the step.

    Source: ZPPO, Algorithm 1, step 2.
    """
    if stages.distill.source == "teacher" and not stages.zone.replay:
        return []
    groups: list[Group] = []
    waves = stages.schedule.waves(instances, step)
    for index, wave in enumerate(waves, 1):
        with metrics.phase("plain_rollout"):
            groups += _sample(stages, wave, step, metrics)
        with metrics.phase("teacher"):
            asked = hard_groups(stages, groups, known)
            if stages.zone.asks_pre_capped:
                to_come = [each.question.id for later in waves[index:] for each in later]
                asked = stages.reformulator.kept(asked, step, stages.num_new_questions, to_come)
            pending.submit([group.question for group in asked])
    return _in_order(groups, instances)


def hard_groups(stages: Stages, groups: Sequence[Group], known: Collection[str]) -> list[Group]:
    """Return the hard plain groups of questions that no earlier round had."""
    hard = select_hard(groups, stages.zone.tau)
    return [group for group in hard if group.question.id not in known]


def sample_reformulated(
    stages: Stages, hard: Sequence[Group], pending: PendingAnswers, step: int, metrics: StepMetrics
) -> tuple[Reformulation, list[Group]]:
    """Reformulate hard questions and sample: first the prompts that no later answer can change,
    the others as answers arrive.

    An answer that can add no prompt any more is not waited for.

    Source: ZPPO, Algorithm 1, steps 3 to 5.
    """
    reformulated = Reformulation()
    sampled: list[Group] = []
    while True:
        with metrics.phase("teacher"):
            pending.poll()
            known = {instance.uid for instance in reformulated.instances}
            reformulated = stages.reformulator.reformulate(
                hard,
                pending.answers,
                step,
                stages.num_new_questions,
                reformulated,
                pending.awaited,
            )
        fresh = [instance for instance in reformulated.instances if instance.uid not in known]
        if fresh:
            with metrics.phase("reformulated_rollout"):
                sampled += _sample(stages, fresh, step, metrics)
        if not reformulated.awaited:
            return reformulated, _in_order(sampled, reformulated.instances)
        if not fresh:
            with metrics.phase("teacher"):
                # With this answer others may not be needed any more.
                pending.wait_for(reformulated.awaited[:1])


def _sample(
    stages: Stages, instances: Sequence[PromptInstance], step: int, metrics: StepMetrics
) -> list[Group]:
    """Generate and verify; count the instances without a group."""
    groups = stages.sampler.sample(instances, stages.sampling, stages.num_rollouts, step)
    metrics.add("rollout/failed_groups", Sum(len(instances) - len(groups)))
    metrics.add("rollout/preempted", Sum(stages.sampler.num_preemptions))
    reasons = list(stages.sampler.failed.values())
    metrics.add("rollout/not_finite_groups", Sum(reasons.count(NOT_FINITE)))
    metrics.add("rollout/no_room_groups", Sum(reasons.count(NO_ROOM)))
    return groups


def _in_order(groups: Sequence[Group], instances: Sequence[PromptInstance]) -> list[Group]:
    """Return groups in the order of their instances."""
    indices = {instance.uid: index for index, instance in enumerate(instances)}
    return sorted(groups, key=lambda group: indices[group.uid])

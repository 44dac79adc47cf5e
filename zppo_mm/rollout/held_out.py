"""Accuracy on held-out questions, always the same ones, sampled by the policy itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.errors import DataError, SampleError
from data.health import SampleHealth
from data.question import Question
from data.source import Source
from zppo_mm.experience import Group, PromptInstance
from zppo_mm.randomness import generator
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import NEEDS_JUDGE, NEEDS_JUDGE_DETAIL
from zppo_mm.rollout.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        step: Rollout steps trained before it.
        accuracy: Mean accuracy over questions and responses.
        accuracy_by_source: The same per data source.
        num_questions: Questions that were answered.
        num_skipped: Held-out questions that were left out: a bad sample, no judge for it, or its
            prompt or media could not be read.
        truncated: Fraction of responses that met the length limit.
        num_too_long: Answered questions whose prompt is longer than those that are trained on.
    """

    step: int
    accuracy: float
    accuracy_by_source: dict[str, float]
    num_questions: int
    num_skipped: int
    truncated: float
    num_too_long: int = 0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The questions of every evaluation of a run.

    Attributes:
        questions: Those that can be asked.
        num_skipped: Chosen ones that cannot.
    """

    questions: tuple[Question, ...] = ()
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.questions)


def held_out_questions(
    folders: Sequence[Source],
    num_questions: int,
    seed: int,
    health: SampleHealth | None = None,
    can_grade: Callable[[Question], bool] = lambda question: True,
) -> HeldOut:
    """Return the run's fixed held-out questions, as many from every folder; one that is left
    out is not replaced.

    Args:
        folders: Held-out sources.
        num_questions: How many in all; 0 means every question.
        seed: The run's seed; a resumed run evaluates on the same questions.
        health: Counts, names the bad ones in the log, and stops when they are too many; not the
            training data's.
        can_grade: Whether responses to a question can be graded.

    Raises:
        DataError: Too many samples are bad, or all.
    """
    counted = health if health is not None else SampleHealth()
    questions: list[Question] = []
    num_skipped = 0
    for index, folder in enumerate(folders):
        keys = list(folder.keys())
        count = len(keys) if num_questions == 0 else _even_part(num_questions, index, len(folders))
        order = generator(seed, "held_out", index).permutation(len(keys))[:count]
        for shard, key in (keys[i] for i in sorted(order)):
            question = _good_question(folder, shard, key, counted, can_grade)
            if question is None:
                num_skipped += 1
            else:
                questions.append(question)
    if num_skipped and not questions:
        raise DataError(
            f"held-out data: no question can be asked, got {num_skipped} that cannot "
            f"({counted.counts | counted.left_out}), expected at least one good; correct "
            "data.held_out"
        )
    return HeldOut(tuple(questions), num_skipped)


def _good_question(
    folder: Source,
    shard: str,
    key: str,
    health: SampleHealth,
    can_grade: Callable[[Question], bool],
) -> Question | None:
    """Return a question that can be asked; what keeps another one out is counted."""
    try:
        question = folder.question(shard, key)
    except SampleError as error:
        health.bad(f"{shard}:{key}", error.reason, str(error))
        return None
    if not can_grade(question):
        health.leave_out(f"{shard}:{key}", NEEDS_JUDGE, NEEDS_JUDGE_DETAIL)
        return None
    health.good()
    return question


def evaluation_instances(
    held_out: HeldOut, plain_text: Callable[[Question], str]
) -> list[PromptInstance]:
    """Return what is asked. The uid, which names the random streams, has the index among all
    questions of the evaluation.
    """
    return [
        PromptInstance(
            uid=f"evaluation/{index}/{question.id}",
            question=question,
            kind="new",
            text=plain_text(question),
        )
        for index, question in enumerate(held_out.questions)
    ]


def ask_held_out(
    sampler: Sampler,
    held_out: HeldOut,
    plain_text: Callable[[Question], str],
    sampling: SamplingParams,
    num_rollouts: int,
    step: int,
) -> list[Group]:
    """Sample and verify responses to plain prompts.

    The random stream of a question does not depend on the step, so that two evaluations differ by
    their weights alone.
    """
    return sampler.sample(evaluation_instances(held_out, plain_text), sampling, num_rollouts, step)


def summarise(
    groups: Sequence[Group], held_out: HeldOut, step: int, max_prompt_tokens: int
) -> Evaluation:
    """Return the accuracy over the groups of one evaluation, and how many of the chosen questions
    have none.

    Args:
        groups: Of the evaluation.
        held_out: The chosen questions.
        step: Rollout steps trained before.
        max_prompt_tokens: Of training. Longer held-out questions are asked all the same.
    """
    by_source: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        by_source[group.question.source].append(group.accuracy)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return Evaluation(
        step=step,
        accuracy=_mean([group.accuracy for group in groups]),
        accuracy_by_source={source: _mean(values) for source, values in sorted(by_source.items())},
        num_questions=len(groups),
        num_skipped=len(held_out) + held_out.num_skipped - len(groups),
        truncated=_mean([float(rollout.finish_reason == "length") for rollout in rollouts]),
        num_too_long=sum(len(group.prompt.token_ids) > max_prompt_tokens for group in groups),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _even_part(total: int, index: int, parts: int) -> int:
    return total // parts + (index < total % parts)

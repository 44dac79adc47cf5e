"""Accuracy on held-out questions, always the same ones, sampled by the policy itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.question import Question
from data.shards import ShardFolder
from zppo_mm.experience import Group, PromptInstance
from zppo_mm.randomness import generator
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.sampler import GroupSampler


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        step: Rollout steps trained before it.
        accuracy: Mean reward over questions and responses.
        accuracy_by_source: The same per data source.
        num_questions: Questions that were answered.
        num_skipped: Held-out questions whose prompt or media could not be read.
        truncated: Share of responses that met the length limit.
    """

    step: int
    accuracy: float
    accuracy_by_source: dict[str, float]
    num_questions: int
    num_skipped: int
    truncated: float


def held_out_questions(folders: Sequence[ShardFolder], num_questions: int, seed: int) -> list[Question]:
    """Return the run's fixed held-out questions, an even share from every folder.

    Args:
        folders: Held-out shard folders.
        num_questions: How many in all; 0 means every question.
        seed: The run's seed; a resumed run evaluates on the same questions.
    """
    questions: list[Question] = []
    for index, folder in enumerate(folders):
        keys = list(folder.keys())
        share = len(keys) if num_questions == 0 else _even_share(num_questions, index, len(folders))
        order = generator(seed, "held_out", index).permutation(len(keys))[:share]
        questions.extend(folder.question(*keys[i]) for i in sorted(order))
    return questions


def evaluate(
    sampler: GroupSampler,
    questions: Sequence[Question],
    plain_text: Callable[[Question], str],
    sampling: SamplingParams,
    num_rollouts: int,
    step: int,
) -> Evaluation:
    """Sample and verify responses to plain prompts.

    The random stream of a question does not depend on the step, so that two evaluations differ by their weights alone.
    """
    instances = [
        PromptInstance(uid=f"evaluation/{index}/{question.id}", question=question, kind="new", text=plain_text(question))
        for index, question in enumerate(questions)
    ]
    groups = sampler.sample(instances, sampling, num_rollouts, step)
    return _summarise(groups, num_asked=len(questions), step=step)


def _summarise(groups: Sequence[Group], num_asked: int, step: int) -> Evaluation:
    by_source: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        by_source[group.question.source].append(group.accuracy)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return Evaluation(
        step=step,
        accuracy=_mean([group.accuracy for group in groups]),
        accuracy_by_source={source: _mean(values) for source, values in sorted(by_source.items())},
        num_questions=len(groups),
        num_skipped=num_asked - len(groups),
        truncated=_mean([float(rollout.finish_reason == "length") for rollout in rollouts]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _even_share(total: int, index: int, parts: int) -> int:
    return total // parts + (index < total % parts)

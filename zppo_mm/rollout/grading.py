"""From what an engine returned to graded rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

from data.question import Question
from encoders.processor import VisionInput
from zppo_mm.experience import Prompt, PromptInstance, Rollout
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.engine import Generation

UNGRADED = "ungraded"


class Grader(Protocol):
    """Grades responses; `zppo_mm.rewards.verify.Verifier` is one."""

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> Sequence[Verdict]:
        """Return one verdict per question and response text, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """An instance of this replica, by its index in the whole list."""

    index: int
    prompt: Prompt
    vision: tuple[VisionInput, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """A replica's result for one instance: its group's parts, or why there is none."""

    index: int
    prompt: Prompt | None = None
    rollouts: tuple[Rollout, ...] = ()
    ungraded: tuple[Rollout, ...] = ()
    reason: str = ""
    detail: str = ""
    num_preemptions: int = 0


def grade(
    verifier: Grader,
    decode: Callable[[Sequence[int]], str],
    instances: Sequence[PromptInstance],
    pairs: Sequence[tuple[Encoded, Sequence[Generation]]],
    version: int,
) -> list[Outcome]:
    """Decode and verify all responses in one batch.

    Args:
        verifier: Grades.
        decode: From token ids to text.
        instances: Of all replicas.
        pairs: This replica's prompts, and their continuations.
        version: Rollout step whose weights drew what does not say so itself.
    """
    texts = [
        [
            decode([*instances[item.index].response_prefix, *generation.response_ids])
            for generation in group
        ]
        for item, group in pairs
    ]
    items = [
        (instances[item.index].question, text)
        for (item, _), group in zip(pairs, texts, strict=True)
        for text in group
    ]
    verdicts = iter(verifier.verify_all(items))
    outcomes = []
    for (item, group), group_texts in zip(pairs, texts, strict=True):
        verdicts_of_group = [next(verdicts) for _ in group]
        rollouts = [
            _rollout(generation, text, verdict, version)
            for generation, text, verdict in zip(group, group_texts, verdicts_of_group, strict=True)
        ]
        has_reward = [verdict.reward is not None for verdict in verdicts_of_group]
        graded = tuple(compress(rollouts, has_reward))
        ungraded = tuple(
            rollout
            for rollout, is_graded in zip(rollouts, has_reward, strict=True)
            if not is_graded
        )
        if graded:
            outcomes.append(Outcome(item.index, item.prompt, graded, ungraded))
        else:
            outcomes.append(
                Outcome(item.index, reason=UNGRADED, detail="none of its rollouts could be graded")
            )
    return outcomes


def _rollout(generation: Generation, text: str, verdict: Verdict, version: int) -> Rollout:
    versions = generation.versions
    return Rollout(
        response_ids=generation.response_ids,
        rollout_logprobs=generation.rollout_logprobs,
        finish_reason=generation.finish_reason,
        text=text,
        parsed=verdict.parsed,
        reward=math.nan if verdict.reward is None else float(verdict.reward),
        policy_version=versions[0].version if versions else version,
        versions=versions if len(versions) > 1 else (),
        parts=verdict.parts,
    )

"""How the prompts of each reformulated kind are made.

A recipe picks rollouts of a hard question, says in which form the prompt uses them, and writes the
text. `zppo_mm.methods.KINDS` declares everything else about a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.question import Question
from zppo_mm.experience import Candidate, GroupKind, Rollout
from zppo_mm.zone.prompts import PromptTemplates

Pick = Callable[
    [list[Rollout], list[Rollout], np.random.Generator],
    Sequence[Rollout],
]
"""From correct teacher rollouts, wrong student rollouts and random numbers to the rollouts that the
prompt is made of; none if there can be no prompt.
"""
Text = Callable[[PromptTemplates, Question, Sequence[Candidate]], str]
"""From the question and what is shown of the picked rollouts to the text of the prompt."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How prompts of one kind are made.

    Attributes:
        pick: Chooses the rollouts.
        form: How the prompt uses them: compressed to `candidates`, rewritten to a `hint`, or as a
            `prefix` of the response, which the text does not show.
        text: Writes the prompt.
        stream: Name of the random stream that `pick` draws from.
    """

    pick: Pick
    form: Literal["candidates", "hint", "prefix"]
    text: Text
    stream: str


def _correct_and_wrong(
    correct: list[Rollout], wrong: list[Rollout], rng: np.random.Generator
) -> Sequence[Rollout]:
    """Pick one of each, in random order."""
    if not (correct and wrong):
        return ()
    pair = correct[rng.integers(len(correct))], wrong[rng.integers(len(wrong))]
    return [pair[int(index)] for index in rng.permutation(2)]


def _all_wrong(
    correct: list[Rollout], wrong: list[Rollout], rng: np.random.Generator
) -> Sequence[Rollout]:
    """Pick every wrong rollout."""
    return wrong


def _one_correct(
    correct: list[Rollout], wrong: list[Rollout], rng: np.random.Generator
) -> Sequence[Rollout]:
    """Pick one correct rollout."""
    return [correct[rng.integers(len(correct))]] if correct else ()


def _bcq_text(
    templates: PromptTemplates, question: Question, candidates: Sequence[Candidate]
) -> str:
    return templates.bcq_text(question, [each.text for each in candidates])


def _ncq_text(
    templates: PromptTemplates, question: Question, candidates: Sequence[Candidate]
) -> str:
    texts = [each.text for each in candidates]
    return templates.ncq_text(question, distinct_answers(candidates), texts)


def _hint_text(
    templates: PromptTemplates, question: Question, candidates: Sequence[Candidate]
) -> str:
    return templates.hint_text(question, candidates[0].text)


def _plain_text(
    templates: PromptTemplates, question: Question, candidates: Sequence[Candidate]
) -> str:
    return templates.plain_text(question)


def distinct_answers(candidates: Iterable[Candidate]) -> list[str]:
    """Return the parsed answers of candidates, each once, in the order of their first
    appearance.
    """
    answers = (candidate.answer for candidate in candidates)
    return list(dict.fromkeys(answer.strip() for answer in answers if answer and answer.strip()))


RECIPES: Mapping[GroupKind, Recipe] = {
    "bcq": Recipe(_correct_and_wrong, "candidates", _bcq_text, "reformulate"),
    "ncq": Recipe(_all_wrong, "candidates", _ncq_text, "ncq"),
    "hint": Recipe(_one_correct, "hint", _hint_text, "hint"),
    "prefix": Recipe(_one_correct, "prefix", _plain_text, "prefix"),
}
"""One recipe per reformulated kind."""

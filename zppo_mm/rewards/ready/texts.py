"""Texts: equal, or similar (ANLS).

The reference is the question's answer, or the best of `metadata["answers"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.question import Question
from zppo_mm.rewards.mathematics import MAX_ANSWER_CHARS

THRESHOLD = 0.5
"""Texts that differ by so much of the longer one, or by more, are not similar at all."""


def exact(question: Question, parsed: str | None, metadata: Any, **others: Any) -> float:
    """Return 1 for an answer that equals a reference, without case and spacing."""
    answer = _plain(parsed or "")
    return float(any(answer == _plain(each) for each in references(question, metadata)))


def anls(question: Question, parsed: str | None, metadata: Any, **others: Any) -> float:
    """Return the normalised Levenshtein similarity to the closest reference, without case and
    spacing; 0 below a similarity of more than a half.

    With the distance d(a, b) in characters and n = d / max(|a|, |b|), it is 1 - n where n < 0.5,
    else 0.

    Source: Scene Text Visual Question Answering (arXiv 1905.13648), ANLS of one question.
    """
    answer = _plain(parsed or "")
    return max(similarity(answer, _plain(each)) for each in references(question, metadata))


def references(question: Question, metadata: Any) -> list[str]:
    """Return the texts that are right."""
    several = metadata.get("answers") if isinstance(metadata, Mapping) else None
    return [str(each) for each in several] if several else [question.answer]


def similarity(one: str, other: str) -> float:
    """Return the ANLS of two texts as they are."""
    longer = max(len(one), len(other))
    if one == other:
        return 1.0
    if longer > MAX_ANSWER_CHARS or abs(len(one) - len(other)) >= THRESHOLD * longer:
        return 0.0
    normalised = distance(one, other) / longer
    return 1 - normalised if normalised < THRESHOLD else 0.0


def distance(one: str, other: str) -> int:
    """Return the fewest insertions, deletions and substitutions that make one text the other."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        above, row = row, [number]
        for index, its in enumerate(other):
            row.append(min(above[index] + (letter != its), above[index + 1] + 1, row[index] + 1))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())

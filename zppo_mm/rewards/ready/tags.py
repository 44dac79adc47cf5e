"""The form of a response: reasoning in tags, then one box."""

from __future__ import annotations

from typing import Any

from data.question import Question
from zppo_mm.reasoning import THINK_CLOSE, THINK_OPEN
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.choice import matches_choice
from zppo_mm.rewards.grading_process import is_equal
from zppo_mm.rewards.mathematics import Undecided, compare

FORMAT_WEIGHT = 0.1


def right_and_tagged(
    question: Question, response: str, parsed: str | None, **others: Any
) -> dict[str, tuple[float, float]]:
    """Reward a right answer to a question of type `math` or `choice` by 0.9, its form by 0.1.

    To be named for these types: the answer is graded by the same rules as without it.

    Source: DeepSeek-R1 (arXiv 2501.12948), accuracy and format rewards.
    """
    return {
        "accuracy": (float(is_right(question, parsed)), 1 - FORMAT_WEIGHT),
        "format": (float(is_tagged(response)), FORMAT_WEIGHT),
    }


def is_tagged(response: str) -> bool:
    """Return whether a response ends its reasoning once, and boxes one answer behind it.

    The opening tag may stand in the prompt.
    """
    before, closes, after = response.partition(THINK_CLOSE)
    return (
        bool(closes)
        and THINK_CLOSE not in after
        and THINK_OPEN not in after
        and before.lstrip().count(THINK_OPEN) == before.lstrip().startswith(THINK_OPEN)
        and after.count("\\boxed{") == 1
    )


def is_right(question: Question, parsed: str | None) -> bool:
    """Return whether an answer is right by the rules of `math` or `choice`."""
    if parsed is None:
        return False
    if question.answer_type == "choice":
        return matches_choice(parsed, question)
    verdict = compare(parsed, final_answer(question.answer) or question.answer)
    return is_equal(verdict.parsed, verdict.gold) if isinstance(verdict, Undecided) else verdict

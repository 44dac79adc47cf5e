"""Multiple choice: the letter or the option's text."""

from __future__ import annotations

import re

from data.errors import DataError
from data.question import Question
from zppo_mm.rewards.mathematics import compare, normalise

_PREFIX = re.compile(r"(?:the )?(?:correct )?(?:(?:final )?answer|option|choice)(?: is)? ?:? ?(?=\S)", re.IGNORECASE)
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:)]?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)[.:]?|([A-Za-z])[.:)]) *(.+)")


def matches_choice(parsed: str, question: Question) -> bool:
    """Return whether an answer names the right option.

    Accepted are the letter (A, a, (A), A., "option A"), the letter with its option's text (A. text), and the option's text alone if
    it is the only option that reads so. A letter with the text of another option is wrong.

    Args:
        parsed: The answer in the response.
        question: Its answer is the right letter.

    Raises:
        DataError: If the reference answer is not the letter of an option.
    """
    gold = _gold_letter(question)
    whole = normalise(parsed)
    text = _PREFIX.sub("", whole, count=1)
    alone = _LETTER_ALONE.fullmatch(text)
    if alone:
        return alone[1].upper() == gold
    both = _LETTER_AND_TEXT.fullmatch(text)
    if both:
        named = (both[1] or both[2]).upper()
        spoken = _letters_of_text(both[3], question)
        return named == gold and (not spoken or gold in spoken)
    return (_letters_of_text(whole, question) or _letters_of_text(text, question)) == [gold]


def _letters_of_text(text: str, question: Question) -> list[str]:
    """Return the options that read like a text: those spelled the same, else those that mean the same."""
    spelled = [_letter(index) for index, choice in enumerate(question.choices) if normalise(choice).casefold() == text.casefold()]
    return spelled or [_letter(index) for index, choice in enumerate(question.choices) if compare(text, choice) is True]


def _gold_letter(question: Question) -> str:
    gold = question.answer.strip().upper()
    letters = [_letter(index) for index in range(len(question.choices))] or [_letter(index) for index in range(26)]
    if gold not in letters:
        raise DataError(
            f"question {question.id!r}: the reference answer is no option's letter, got {question.answer!r}, expected one of "
            f"{', '.join(letters)}; correct the sample"
        )
    return gold


def _letter(index: int) -> str:
    return chr(ord("A") + index)

"""Multiple choice: the letter or the option's text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from data.choices import option_letters
from data.errors import DataError
from data.question import Question
from zppo_mm.rewards.mathematics import compare
from zppo_mm.rewards.notation import normalise

_PREFIX = re.compile(
    r"(?:the )?(?:correct )?(?:(?:final )?answer|option|choice)(?: is)? ?:? ?(?=\S)", re.IGNORECASE
)
_LETTER_ALONE = re.compile(r"[(\[{]? ?([A-Za-z]) ?[)\]}]?[.:)]?")
_BRACKETED_LETTER = r"[(\[] ?([A-Za-z]) ?[)\]]"
_LETTER_AND_TEXT = re.compile(
    rf"(?:{_BRACKETED_LETTER}[.:,-]?|([A-Za-z]) ?(?:[.:,)=]| -(?= ))) *(.+)"
)


def matches_choice(parsed: str, question: Question) -> bool:
    """Return whether an answer names the right option.

    Accepted are the letter (A, a, (A), [A], A., "option A"), the letter with its option's text (`A.
    text`, `A, text`, `A: text`), and the option's text alone if it is the only option that reads
    so. A letter with the text of another option is wrong. A small letter that is an option's text
    is that text.

    Args:
        parsed: The answer in the response.
        question: Its answer is the right letter, the letter with its option's text, or that text.

    Raises:
        DataError: If the reference answer names no option.
    """
    choices = _texts(question.choices)
    gold = _gold_letter(question, choices)
    whole = normalise(parsed.replace("**", ""))
    text = _PREFIX.sub("", whole, count=1)
    alone = _LETTER_ALONE.fullmatch(text)
    if alone:
        return _read_letter(alone[1], choices) == gold
    both = _LETTER_AND_TEXT.fullmatch(text)
    if both:
        return _names_both(
            (both[1] or both[2]).upper(),
            both[3],
            gold,
            choices,
            with_comma="," in text[: both.start(3)],
        )
    return (_letters_of_text(whole, choices) or _letters_of_text(text, choices)) == [gold]


def names_an_option(parsed: str, question: Question) -> bool:
    """Return whether an answer names one of the options, right or wrong."""
    return any(
        matches_choice(parsed, replace(question, answer=letter))
        for letter in option_letters(len(question.choices) or 26)
    )


def _read_letter(letter: str, choices: Sequence[str]) -> str:
    """Return the option that one letter names: an option's text if it is written so and names no
    other option as a capital.
    """
    spelled = _options(choices, lambda choice: choice == letter)
    is_letter = not choices or letter.upper() in option_letters(len(choices))
    if spelled and (not is_letter or letter.islower()):
        return spelled[0] if len(spelled) == 1 else ""
    if is_letter:
        return letter.upper()
    casefolded = _options(choices, lambda choice: choice.casefold() == letter.casefold())
    return casefolded[0] if len(casefolded) == 1 else ""


def _names_both(named: str, text: str, gold: str, choices: Sequence[str], with_comma: bool) -> bool:
    """Return whether a letter and the text behind it name the right option; behind a comma the text
    has to be an option's.
    """
    alone = _LETTER_ALONE.fullmatch(text)
    if alone and choices and _read_letter(alone[1], choices) not in ("", named):
        return False
    letters = _letters_of_text(text, choices)
    return named == gold and (gold in letters if letters or with_comma else not alone)


def _options(choices: Sequence[str], is_meant: Callable[[str], bool]) -> list[str]:
    """Return the letters of the options that are meant."""
    letters = option_letters(len(choices))
    return [letter for letter, choice in zip(letters, choices, strict=True) if is_meant(choice)]


def _letters_of_text(text: str, choices: Sequence[str]) -> list[str]:
    """Return the options that read like a text: those spelled the same, else those that mean the
    same.
    """
    spelled = _options(choices, lambda choice: choice.casefold() == text.casefold())
    return spelled or _options(choices, lambda choice: compare(text, choice) is True)


def _texts(choices: Sequence[str]) -> list[str]:
    """Return the options' normalised texts, without the letters if every option begins with its
    own.
    """
    texts = [normalise(choice) for choice in choices]
    matches = [match for text in texts if (match := _LETTER_AND_TEXT.fullmatch(text))]
    letters = [(match[1] or match[2]).upper() for match in matches]
    return (
        [match[3].strip() for match in matches] if letters == option_letters(len(texts)) else texts
    )


def _gold_letter(question: Question, choices: Sequence[str]) -> str:
    letters = option_letters(len(choices) or 26)
    gold = normalise(question.answer)
    alone, both = _LETTER_ALONE.fullmatch(gold), _LETTER_AND_TEXT.fullmatch(gold)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    named = (both[1] or both[2]).upper() if both else ""
    if both and named in letters and (not choices or named in _letters_of_text(both[3], choices)):
        return named
    by_text = _letters_of_text(gold, choices)
    if len(by_text) == 1:
        return by_text[0]
    raise DataError(
        f"question {question.id!r}: the reference answer is no option's letter, got "
        f"{question.answer!r}, expected one of {', '.join(letters)}; correct the sample"
    )

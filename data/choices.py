"""Which option of a multiple-choice question an answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Reading = Literal["letter", "text", "either"]

_LETTER = re.compile(r"\(?([A-Z])[).:]*")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])[).:]\s*(.+)", re.DOTALL)


def option_letters(count: int) -> list[str]:
    """Return the letters of so many options."""
    return [chr(ord("A") + index) for index in range(count)]


def named_options(answer: str, choices: Sequence[str], reading: Reading = "either") -> list[str]:
    """Return the letters of the options that an answer names by letter, by text, or by both
    (`B. blue`).

    Args:
        answer: A reference answer.
        choices: Option texts.
        reading: What an answer is that can be read both ways: always a `letter`, always a `text`,
            or `either`, which then names both options.
    """
    letters = option_letters(len(choices))
    by_text = [letter for letter, choice in zip(letters, choices, strict=True) if choice == answer]
    alone, both = _LETTER.fullmatch(answer), _LETTER_AND_TEXT.fullmatch(answer)
    by_letter = [alone[1]] if alone and alone[1] in letters else []
    if both and not by_text and (both[1], both[2]) in zip(letters, choices, strict=True):
        by_letter = [both[1]]
    if reading == "either":
        return sorted({*by_letter, *by_text})
    return (by_text or by_letter) if reading == "text" else (by_letter or by_text)

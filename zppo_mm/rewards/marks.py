"""Degree and percent marks, which do not count."""

from __future__ import annotations

import re

from zppo_mm.rewards.units import UPRIGHT

_DEGREE = re.compile(
    r" ?\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\}) ?|(?<=[0-9]) ?\\circ(?![a-zA-Z]) ?|(?<=[0-9])\^ "
    r"?(?:o|\{ ?o ?\})(?![a-zA-Z])|(?<=[0-9)}]) ?deg(?:rees?)?(?![a-zA-Z])"
)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES_OF_ANGLE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})")
_PERCENT = re.compile(r" ?%| ?(?<![a-zA-Z])(?:per ?cent(?:age)?|pct)(?![a-zA-Z])")
_TEMPERATURE = re.compile(r"(\^ ?\{? ?\\circ ?\}?) ?([CF])(?![A-Za-z])")
_MARKED = re.compile(r"[%^]|circ|deg|cent|pct")
_SPOKEN_SETS = {
    "all real numbers": "\\mathbb{R}",
    "all reals": "\\mathbb{R}",
    "no solution": "\\emptyset",
    "no solutions": "\\emptyset",
    "empty set": "\\emptyset",
    "the empty set": "\\emptyset",
}


def without_marks(text: str) -> tuple[str, frozenset[str]]:
    """Return a normalised answer without its marks, and which it had; sets in words come as their
    symbols.
    """
    if text[:1].isalpha():
        text = _SPOKEN_SETS.get(text.casefold(), text)
    if not _MARKED.search(text):
        return text, frozenset()
    if "\\circ" in text and _ANGLE_FUNCTION.search(text):
        # An angle in degrees is no number there.
        text = _DEGREES_OF_ANGLE.sub(r"(\\frac{\1\\pi}{180})", text)
    text = _TEMPERATURE.sub(rf"\1 \2{UPRIGHT}", text)
    marks = frozenset(
        name
        for name, pattern in (("degree", _DEGREE), ("percent", _PERCENT))
        if pattern.search(text)
    )
    return (
        re.sub(r" +", " ", _PERCENT.sub(" ", _DEGREE.sub(" ", text))).strip() if marks else text
    ), marks

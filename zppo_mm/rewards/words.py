"""Answers in words: which texts are, and when they say the same."""

from __future__ import annotations

import re

from zppo_mm.rewards.structure import squeeze

_COMMAND = re.compile(r"\\(?:begin|end) ?\{[^{}]*\}|\\[a-zA-Z]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_MATH_NAMES = (
    "sqrt cbrt sin cos tan sec csc cot arcsin arccos arctan asin acos atan sinh cosh tanh log exp lim max min gcd lcm mod deg inf "
    "infinity infty pi frac binom cdot times"
)
_MATH_WORDS = frozenset(_MATH_NAMES.split())
_SHORT_WORDS = frozenset(("no", "on", "up", "in", "so", "if", "we", "he", "it", "go", "us"))


def is_textual(text: str) -> bool:
    """Return whether a normalised text has a word that is no name in mathematics."""
    words = _LETTERS.findall(_COMMAND.sub(" ", text))
    return any((len(word) > 2 and word.lower() not in _MATH_WORDS) or word.lower() in _SHORT_WORDS for word in words)


def spoken(text: str) -> str:
    """Return a text without what is not heard: case, hyphens, quotation marks."""
    return squeeze(text.replace("-", " ").replace('"', "")).casefold().strip("!? ")

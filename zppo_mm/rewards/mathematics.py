"""Comparison of final answers: decided here where it is plain, handed on to a worker where it takes algebra.

Nothing here evaluates what a model wrote; the work is bounded by the length of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from zppo_mm.rewards.quantities import parse_number, parse_ratio, split_unit

MAX_ANSWER_CHARS = 1000

_TRANSLATION = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2007\t\n\r", " "),
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u22c5": "\\cdot ",
        "\u00f7": "/",
        "\u2044": "/",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00b0": "^\\circ ",
        "\uff05": "%",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
    }
)
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|textstyle|big|Big)(?![a-zA-Z])\.?|\\!")
_SPACE = re.compile(r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_DEGREE = re.compile(r" ?\^ ?(?:\\circ|\{ ?\\circ ?\})(?![a-zA-Z])| ?\\degree(?![a-zA-Z])| degrees?(?![a-zA-Z])")
_PERCENT = re.compile(r" ?\\?%| per ?cent(?![a-zA-Z])")
_ASSIGNMENT = re.compile(r"(\\?[A-Za-z]+(?:_\{?\w+\}?)?) ?= ?([^=<>]+)")
_AROUND_SYMBOL = re.compile(r" ?([^\w\s]) ?")
_AFTER_COMMAND = re.compile(r"(\\[a-zA-Z]+) (?![a-zA-Z])")
_COMMAND = re.compile(r"\\(?:begin|end) ?\{[^{}]*\}|\\[a-zA-Z]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_MATH_NAMES = (
    "sqrt cbrt sin cos tan sec csc cot arcsin arccos arctan asin acos atan sinh cosh tanh log exp lim max min gcd lcm mod deg inf "
    "infinity infty pi frac binom cdot times"
)
_MATH_WORDS = frozenset(_MATH_NAMES.split())
_SHORT_WORDS = frozenset(("no", "on", "up", "in", "so", "if", "we", "he", "it", "go", "us"))


@dataclass(frozen=True, slots=True)
class Undecided:
    """What is left to compare by algebra, normalised."""

    parsed: str
    gold: str


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}`, `None` if there is none, it is empty, or its brace is never closed."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    brace = re.compile(r"\s*\{").match(text, start + len("\\boxed"))
    if brace is None:
        return None
    depth, position = 1, brace.end()
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace does not count
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[brace.end() : position].strip() or None
        position += 1
    return None


def normalise(answer: str) -> str:
    """Return the answer in one spelling: no delimiters, layout commands or text wrappers, single spaces."""
    text = _without_period(answer.translate(_TRANSLATION).strip())
    for opening, closing in _DELIMITERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    text = _LAYOUT.sub("", text)
    text = _TEXT.sub(r" \1 ", text)
    text = _SPACE.sub(" ", text).replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = _AFTER_COMMAND.sub(r"\1", re.sub(r" +", " ", text)).strip()
    return _without_period(text)


def compare(parsed: str, gold: str) -> bool | Undecided:
    """Decide whether two answers are the same, as far as that can be done by looking.

    - Numbers are compared exactly: 1/2 = 0.5 = \\frac12, but 1/3 is not 0.3333333333.
    - Degree and percent marks do not count (30° = 30, 75% = 75), so 75% is neither 3/4 nor 0.75; two different marks differ.
    - A unit on one side only does not count; two different units differ. No unit is converted.
    - A ratio is compared term by term with a ratio, and is no fraction: 1:2 is not 1/2.
    - `x = 5` is 5. Words are compared as words, without case.

    Args:
        parsed: The answer in a response.
        gold: The reference answer.

    Returns:
        The verdict, or `Undecided` with the pair to be compared by algebra.
    """
    if parsed.strip() == gold.strip():
        return True
    if max(len(parsed), len(gold)) > MAX_ANSWER_CHARS:
        return False
    if _INTEGER.fullmatch(parsed) and _INTEGER.fullmatch(gold):
        return int(parsed) == int(gold)
    left, right = _Answer.read(parsed), _Answer.read(gold)
    if left.marks and right.marks and left.marks != right.marks:
        return False
    if left.variable and right.variable and left.variable != right.variable:
        return Undecided(left.whole, right.whole)
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if _squeeze(left.body) == _squeeze(right.body):
        return True
    verdict = _compare_values(left.body, right.body)
    return Undecided(left.body, right.body) if verdict is None else verdict


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer taken apart: marks and unit off, the right side of an assignment."""

    whole: str
    body: str
    variable: str
    unit: str
    marks: frozenset[str]

    @classmethod
    def read(cls, answer: str) -> _Answer:
        text = normalise(answer)
        whole = re.sub(r" +", " ", _PERCENT.sub(" ", _DEGREE.sub(" ", text))).strip()
        marks = frozenset(name for name, pattern in (("degree", _DEGREE), ("percent", _PERCENT)) if pattern.search(text))
        assignment = _ASSIGNMENT.fullmatch(whole)
        body, unit = split_unit(assignment[2].strip() if assignment else whole)
        return cls(whole, body, assignment[1] if assignment else "", unit, marks)


def _compare_values(left: str, right: str) -> bool | None:
    ratios = parse_ratio(left), parse_ratio(right)
    if any(ratio is not None for ratio in ratios):
        return ratios[0] == ratios[1]
    numbers = parse_number(left), parse_number(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    # Algebra reads words as products of letters, for which "listen" is "silent".
    if _is_textual(left) or _is_textual(right):
        return _squeeze(left).casefold() == _squeeze(right).casefold()
    return None


def _without_period(text: str) -> str:
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _squeeze(text: str) -> str:
    """Drop the spaces that mean nothing; one between two letters or digits stays, for "1 0" is not "10"."""
    return _AROUND_SYMBOL.sub(r"\1", text)


def _is_textual(text: str) -> bool:
    words = _LETTERS.findall(_COMMAND.sub(" ", text))
    return any((len(word) > 2 and word.lower() not in _MATH_WORDS) or word.lower() in _SHORT_WORDS for word in words)

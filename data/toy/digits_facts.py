"""Facts of which a student knows a part: what a number and a digit add up to, and which of two
digits is larger.

A known fact is written right. A half-formed one is written right at a rate of its own, else with a
mistake of its own, always the same. So how often a question is solved follows from the facts that
it needs, and its mistakes repeat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from data.toy.digits import DigitKind, DigitProblem, running_values

FACT_KINDS: tuple[DigitKind, ...] = ("sum", "largest")
"""Kinds of questions whose steps are facts; the steps of all others are known."""
HALF_FORMED_FRACTION = 0.4
RATES = (0.0, 0.05, 0.15, 0.3)
"""At which a half-formed fact is written right; every one has one of them."""

Step = Callable[[int, int], int]
"""From the result so far and the next digit to the next result."""


def truth(kind: DigitKind, value: int, digit: int) -> int:
    """Return the result of a step."""
    return value + digit if kind == "sum" else max(value, digit)


def rate(kind: DigitKind, value: int, digit: int) -> float:
    """Return how often the student writes a fact right; tens do not matter for a sum."""
    trivial = value == digit if kind == "largest" else not (value % 10 and digit)
    draw = _digest(kind, value, digit)
    if trivial or draw[0] >= 256 * HALF_FORMED_FRACTION:
        return 1.0
    return RATES[draw[1] % len(RATES)]


def mistake(kind: DigitKind, value: int, digit: int) -> int:
    """Return what the student writes where it does not write the truth: of two digits the smaller
    one; of a sum half of the carries are forgotten, and all others are one off.
    """
    if kind == "largest":
        return min(value, digit)
    draw = _digest(kind, value, digit)[2]
    if value % 10 + digit >= 10 and draw % 2:
        return value + digit - 10
    return value + digit + (1 if draw & 2 else -1)


def plausible(kind: DigitKind, value: int, digit: int) -> list[int]:
    """Return results that someone without the fact may take for the right one, which is among
    them.
    """
    if kind == "largest":
        return sorted({value, digit})
    total = value + digit
    return [each for each in (total - 10, *range(total - 2, total + 3)) if each >= 0]


def results(problem: DigitProblem, step: Step) -> list[int]:
    """Return the result after each digit, where every step follows from the one before."""
    values = [problem.digits[0]]
    for digit in problem.digits[1:]:
        values.append(step(values[-1], digit))
    return values


def right_results(problem: DigitProblem) -> list[int]:
    """Return the right result after each digit; none where the digits are only read."""
    return [] if problem.kind == "read" else running_values(problem)


def _digest(kind: DigitKind, value: int, digit: int) -> bytes:
    ones = value % 10 if kind == "sum" else value
    return hashlib.blake2b(f"{kind} {ones} {digit}".encode(), digest_size=4).digest()

"""Digit questions: small arithmetic over a few handwritten digits, as text, as one image or as a
video.

Every draw follows from a seed. Train and held-out questions never share a digit sequence nor a
digit image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from data.errors import DataError

Modality = Literal["text", "image", "video"]
Split = Literal["train", "held_out"]
DigitKind = Literal["read", "sum", "largest", "even", "equal", "alternating"]

MODALITIES: tuple[Modality, ...] = ("text", "image", "video")
KINDS: tuple[DigitKind, ...] = ("read", "sum", "largest", "even", "equal", "alternating")
LEVELS: tuple[int, ...] = (2, 3, 4, 5, 6)
"""Numbers of digits, from easy to hard."""
_T = TypeVar("_T")

CHOICE_FRACTION = 0.2
HELD_OUT_FRACTION = 0.2
LETTERS = "ABCD"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES: Mapping[DigitKind, str] = {
    "read": "Which number do the digits{where} form?",
    "sum": "What is the sum of the digits{where}?",
    "largest": "What is the largest of the digits{where}?",
    "even": "How many of the digits{where} are even?",
    "equal": "How many of the digits{where} are {target}?",
    "alternating": "What is the alternating sum of the digits{where}?",
}


@dataclass(frozen=True, slots=True)
class DigitProblem:
    """One question before it is shown in a modality.

    Attributes:
        kind: What is asked.
        digits: The digits in order.
        target: The digit to be counted; only for `equal`.
        choices: Four option texts of a multiple-choice question, else empty.
    """

    kind: DigitKind
    digits: tuple[int, ...]
    target: int | None = None
    choices: tuple[str, ...] = ()

    @property
    def value(self) -> str:
        """The result as a number, whether or not it is asked for as a choice."""
        if self.kind == "read":
            return "".join(map(str, self.digits))
        return str(running_values(self)[-1])

    @property
    def answer(self) -> str:
        return LETTERS[self.choices.index(self.value)] if self.choices else self.value

    @property
    def answer_type(self) -> Literal["math", "choice"]:
        return "choice" if self.choices else "math"

    @property
    def level(self) -> int:
        return len(self.digits)

    def text(self, modality: Modality) -> str:
        """Return the question as the user asks it, options not included."""
        where = (
            " " + " ".join(WORDS[digit] for digit in self.digits)
            if modality == "text"
            else f" in the {modality}"
        )
        return PHRASES[self.kind].format(where=where, target=self.target)


def running_values(problem: DigitProblem) -> list[int]:
    """Return the partial result after each digit, the last one being the answer."""
    digits = problem.digits
    if problem.kind == "sum":
        steps = list(digits)
    elif problem.kind == "alternating":
        steps = [digit if i % 2 == 0 else -digit for i, digit in enumerate(digits)]
    elif problem.kind == "even":
        steps = [int(digit % 2 == 0) for digit in digits]
    elif problem.kind == "equal":
        steps = [int(digit == problem.target) for digit in digits]
    elif problem.kind == "largest":
        return [max(digits[: i + 1]) for i in range(len(digits))]
    else:
        raise DataError(
            f"digits: {problem.kind!r} has no running value; expected one of {KINDS[1:]}"
        )
    return [int(total) for total in np.cumsum(steps)]


def sequence_split(digits: Sequence[int]) -> Split:
    """Return the split that owns a digit sequence; the same for every seed, so that the splits stay
    disjoint.
    """
    digest = hashlib.blake2b(bytes(digits), digest_size=4).digest()
    return "held_out" if int.from_bytes(digest, "little") < HELD_OUT_FRACTION * 2**32 else "train"


def draw_problem(
    rng: np.random.Generator,
    split: Split,
    levels: Mapping[int, float] | None = None,
    kinds: Mapping[DigitKind, float] | None = None,
    choice_fraction: float = CHOICE_FRACTION,
) -> DigitProblem:
    """Draw one problem.

    Args:
        rng: Source of all randomness.
        split: Which digit sequences are allowed.
        levels: Relative weight per number of digits; `None` weighs all of `LEVELS` alike.
        kinds: Relative weight per kind; `None` weighs all of `KINDS` alike.
        choice_fraction: Fraction of multiple-choice questions.
    """
    kind = _weighted(rng, kinds or dict.fromkeys(KINDS, 1.0))
    level = _weighted(rng, levels or dict.fromkeys(LEVELS, 1.0))
    digits = tuple(int(digit) for digit in rng.integers(0, 10, level))
    # Single digits, the first stage of supervised training, are too few to be split.
    while level > 1 and sequence_split(digits) != split:
        digits = tuple(int(digit) for digit in rng.integers(0, 10, level))
    target = (
        int(rng.choice(digits) if rng.random() < 0.7 else rng.integers(0, 10))
        if kind == "equal"
        else None
    )
    problem = DigitProblem(kind, digits, target)
    if rng.random() >= choice_fraction:
        return problem
    return DigitProblem(kind, digits, target, _options(rng, problem))


def _weighted(rng: np.random.Generator, weights: Mapping[_T, float]) -> _T:
    values = list(weights)
    probabilities = np.array([weights[value] for value in values], dtype=np.float64)
    return values[int(rng.choice(len(values), p=probabilities / probabilities.sum()))]


def _options(rng: np.random.Generator, problem: DigitProblem) -> tuple[str, ...]:
    """Return the right value and three near ones in random order."""
    if problem.kind == "read":
        near = _near_readings(rng, problem.digits)
    else:
        right = int(problem.value)
        lowest = right - 3 if problem.kind == "alternating" else max(0, right - 3)
        highest = 9 if problem.kind == "largest" else lowest + 7
        near = [str(value) for value in range(lowest, highest + 1) if value != right]
    wrong = rng.choice(len(near), 3, replace=False)
    options = [problem.value, *(near[int(i)] for i in wrong)]
    return tuple(options[int(i)] for i in rng.permutation(4))


def _near_readings(rng: np.random.Generator, digits: tuple[int, ...]) -> list[str]:
    """Return the number with one digit changed, for every position."""
    near = []
    for index in range(len(digits)):
        other = int((digits[index] + rng.integers(1, 10)) % 10)
        near.append("".join(map(str, (*digits[:index], other, *digits[index + 1 :]))))
    index = int(rng.integers(len(digits)))
    while len(set(near)) < 3:
        other = int((digits[index] + rng.integers(1, 10)) % 10)
        near.append("".join(map(str, (*digits[:index], other, *digits[index + 1 :]))))
    return sorted(set(near))

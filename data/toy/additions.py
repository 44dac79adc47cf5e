r"""Additions in three sizes as JSON lines, after earlier messages that show the form of an answer,
and their worked solutions by rule.

A language model without practice in `\boxed{}` copies the form; whether it can add differs by size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.toy.question_files import check_counts, write_lines

SIZES: Mapping[str, tuple[range, range]] = {
    "up to 20": (range(1, 21), range(1, 21)),
    "2 + 1 digits": (range(21, 90), range(1, 10)),
    "2 + 2 digits": (range(21, 90), range(21, 90)),
}
"""The terms of each size, by the name that is the source of its questions."""
SHOWN = ((4, 3), (12, 5), (30, 16))
"""The additions of the earlier messages, none of which is asked."""
# The smallest have the fewest pairs, 210 less those that are shown.
MAX_QUESTIONS = 208 * len(SIZES)

_ADDITION = re.compile(r"(\d+) \+ (\d+)")


def write_additions(
    out_dir: str | Path, num_train: int, num_held_out: int, seed: int = 0
) -> dict[str, int]:
    """Write train.jsonl and held_out.jsonl, which share no pair of terms in either order; the same
    arguments give the same bytes.

    Args:
        out_dir: Made if it is missing; older files of these names are replaced.
        num_train: Questions to train on, of all sizes in turn.
        num_held_out: Questions to evaluate on, likewise.
        seed: Of all draws.

    Returns:
        Number of questions by file name.

    Raises:
        DataError: Fewer than one question, or more than there are different pairs of every size.
    """
    check_counts("additions", num_train, num_held_out, MAX_QUESTIONS)
    total = num_train + num_held_out
    pairs = {size: _pairs(size, seed) for size in SIZES}
    sizes = [list(SIZES)[number % len(SIZES)] for number in range(total)]
    asked = [pairs[size].pop() for size in sizes]
    lines = [
        {
            "id": f"additions-{seed}-{number:04d}",
            "messages": messages(*terms),
            "answer": str(sum(terms)),
            "answer_type": "math",
            "source": size,
        }
        for number, (size, terms) in enumerate(zip(sizes, asked, strict=True))
    ]
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train.jsonl": lines[:num_train], "held_out.jsonl": lines[num_train:]}
    for name, part in parts.items():
        write_lines(folder / name, part)
    return {name: len(part) for name, part in parts.items()}


def messages(one: int, two: int) -> list[dict[str, str]]:
    """Return an addition as a conversation: the solved ones, then the question."""
    shown = [
        message
        for first, second in SHOWN
        for message in (
            {"role": "user", "content": _question(first, second)},
            {
                "role": "assistant",
                "content": f"{first} + {second} = \\boxed{{{first + second}}}",
            },
        )
    ]
    return [*shown, {"role": "user", "content": _question(one, two)}]


def read_terms(text: str) -> tuple[int, int] | None:
    """Return the terms of the addition in a message; `None` if there is none."""
    found = _ADDITION.search(text)
    return (int(found[1]), int(found[2])) if found else None


def worked_solutions(one: int, two: int, error_rate: float) -> dict[str, float]:
    """Return worked solutions in plain words with their probabilities, which add up to 1.

    Tens come first or ones, equally often. With probability `error_rate` the sum of the ones is too
    large or too small by 1, and so is the result.

    Args:
        one: First term, of at most two digits.
        two: Second term, likewise.
        error_rate: Probability of a wrong result.
    """
    slips = {0: 1 - error_rate, 1: error_rate / 2, -1: error_rate / 2}
    solutions: Counter[str] = Counter()
    for slip, probability in slips.items():
        for tens_first in (True, False):
            solutions[_worked(one, two, slip, tens_first)] += probability / 2  # type: ignore[assignment]
    return {text: probability for text, probability in solutions.items() if probability}


def _question(one: int, two: int) -> str:
    return f"What is {one} + {two}?"


def _worked(one: int, two: int, slip: int, tens_first: bool) -> str:
    # None at all cannot be too few.
    ones = abs(one % 10 + two % 10 + slip)
    tens = one // 10 * 10 + two // 10 * 10
    steps = [f"{one % 10} and {two % 10} make {ones}."]
    if tens:
        kept = [str(term // 10 * 10) for term in (one, two) if term >= 10]
        made = f" make {tens}" if len(kept) == 2 else ""
        steps = [f"The ones: {steps[0]}", f"The tens: {' and '.join(kept)}{made}."]
        if tens_first:
            steps.reverse()
        steps.append(f"{tens} and {ones} make {tens + ones}.")
    return " ".join((*steps, f"\\boxed{{{tens + ones}}}"))


def _pairs(size: str, seed: int) -> list[tuple[int, int]]:
    """Return all pairs of terms of a size in random order, each pair in one of its two orders."""
    pairs = {frozenset((one, two)) for one in SIZES[size][0] for two in SIZES[size][1]}
    pairs -= {frozenset(shown) for shown in SHOWN}
    draw = np.random.Generator(np.random.Philox(key=[seed, list(SIZES).index(size)]))
    # Two equal terms are a set of one.
    ordered = [(min(pair), max(pair)) for pair in sorted(pairs, key=sorted)]
    return [ordered[index][:: draw.choice((-1, 1))] for index in draw.permutation(len(ordered))]

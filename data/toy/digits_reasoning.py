"""Short written-out reasoning for the digit questions, for supervised training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.toy.digits import DigitProblem, running_values

MISREAD_FRACTION = 0.5


def reasoning(problem: DigitProblem) -> str:
    """Return the partial results digit by digit, e.g. `3+7=10+1=11` for a sum and `3:0,4:1` for a
    count.
    """
    return chain(problem, [] if problem.kind == "read" else running_values(problem))


def solution(problem: DigitProblem) -> str:
    """Return the whole response: reasoning inside `<think>`, final answer in a box.

    A multiple-choice question is answered with the text of the option, which counts like its
    letter.
    """
    return response(reasoning(problem), problem.value)


def response(thought: str, answer: str) -> str:
    """Return a response in the format that the closing instruction asks for."""
    return f"<think>{thought}</think>\\boxed{{{answer}}}"


def flawed_solution(rng: np.random.Generator, problem: DigitProblem) -> tuple[str, str]:
    """Return a wrong response and its answer: one digit misread, or one slip that the following
    steps carry on.

    Args:
        rng: Draws the flaw.
        problem: What was asked.
    """
    while True:
        index = int(rng.integers(problem.level))
        if problem.kind == "read" or rng.random() < MISREAD_FRACTION:
            digit = int((problem.digits[index] + rng.integers(1, 10)) % 10)
            misread = replace(
                problem,
                digits=(*problem.digits[:index], digit, *problem.digits[index + 1 :]),
                choices=(),
            )
            thought, value = reasoning(misread), misread.value
        else:
            slip = 1 if problem.kind in ("even", "equal") else int(rng.choice((-2, -1, 1, 2)))
            values = [
                value + slip * (i >= max(index, 1))
                for i, value in enumerate(running_values(problem))
            ]
            thought, value = chain(problem, values), str(values[-1])
        if value != problem.value:
            return response(thought, value), value


def read_out(problem: DigitProblem) -> tuple[str, str]:
    """Return the response of someone who reads the digits out, whatever is asked, and its
    answer.
    """
    reading = replace(problem, kind="read", target=None, choices=())
    return solution(reading), reading.value


def guess(rng: np.random.Generator, problem: DigitProblem) -> str:
    """Return a response that skips the reasoning and boxes the answer to other digits, or any
    option.

    Args:
        rng: Draws the guess.
        problem: What was asked.
    """
    if problem.choices:
        return response("", problem.choices[int(rng.integers(len(problem.choices)))])
    digits = tuple(int(digit) for digit in rng.integers(0, 10, problem.level))
    return response("", replace(problem, digits=digits).value)


def terse(problem: DigitProblem, values: Sequence[int]) -> str:
    """Return the reasoning of someone who reads a digit and takes it into account in one step: the
    results alone, e.g. `10,11` for `3+7=10+1=11`; the digits where they are only read.
    """
    if problem.kind == "read":
        return chain(problem, values)
    return ",".join(map(str, values[problem.kind not in ("even", "equal") :]))


def chain(problem: DigitProblem, values: Sequence[int]) -> str:
    """Return the reasoning with these results after each digit, right or wrong."""
    digits = problem.digits
    if problem.kind == "read":
        return ",".join(map(str, digits))
    if problem.kind in ("even", "equal"):
        return ",".join(f"{digit}:{value}" for digit, value in zip(digits, values, strict=True))
    sign = "|" if problem.kind == "largest" else "+"
    parts = [str(digits[0])]
    for index, (digit, value) in enumerate(zip(digits[1:], values[1:], strict=True), start=1):
        parts.append(
            f"{'-' if problem.kind == 'alternating' and index % 2 else sign}{digit}={value}"
        )
    return "".join(parts)

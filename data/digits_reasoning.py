"""Short written-out reasoning for the digit questions, for supervised training."""

from __future__ import annotations

from data.digits import DigitProblem, running_values


def reasoning(problem: DigitProblem) -> str:
    """Return the partial results digit by digit, e.g. `3+7=10+1=11` for a sum and `3:0,4:1` for a count."""
    digits = problem.digits
    if problem.kind == "read":
        return ",".join(map(str, digits))
    values = running_values(problem)
    if problem.kind in ("even", "equal"):
        return ",".join(f"{digit}:{value}" for digit, value in zip(digits, values, strict=True))
    sign = "|" if problem.kind == "largest" else "+"
    parts = [str(digits[0])]
    for place, (digit, value) in enumerate(zip(digits[1:], values[1:], strict=True), start=1):
        parts.append(f"{'-' if problem.kind == 'alternating' and place % 2 else sign}{digit}={value}")
    return "".join(parts)


def solution(problem: DigitProblem) -> str:
    """Return the whole response: reasoning inside `<think>`, final answer in a box."""
    return f"<think>{reasoning(problem)}</think>\\boxed{{{problem.answer}}}"

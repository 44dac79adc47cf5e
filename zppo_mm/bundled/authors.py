"""Who writes the responses of the second experiment: a student with half-formed facts, in long
steps, and a teacher that knows everything, tersely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from data.toy.digits import DigitProblem
from data.toy.digits_facts import (
    FACT_KINDS,
    Step,
    mistake,
    plausible,
    rate,
    results,
    right_results,
    truth,
)
from data.toy.digits_reasoning import chain, response, terse

Form = Literal["plain", "bcq", "ncq", "rewrite"]
"""What a prompt asks for: an answer, beside candidates or not, or a response rewritten."""
MAX_NCQ_CANDIDATES = 8
NUM_TRIES = 8
FLAWED_FRACTION = 0.3
LONG_FRACTION = 0.8
"""Of the responses to be rewritten."""
SLIPS = (-10, -2, -1, 1, 2, 10)


@dataclass(frozen=True, slots=True)
class Draft:
    """Results and the answer that they lead to.

    Attributes:
        problem: With the digits as they were read.
        values: The result after each digit; none where they are only read.
    """

    problem: DigitProblem
    values: Sequence[int]

    @property
    def answer(self) -> str:
        return str(self.values[-1]) if self.values else self.problem.value

    @property
    def long(self) -> str:
        return response(chain(self.problem, self.values), self.answer)

    @property
    def terse(self) -> str:
        return response(terse(self.problem, self.values), self.answer)


@dataclass(frozen=True, slots=True)
class Written:
    """What a prompt shows, and the response to learn.

    Attributes:
        shown: Responses that are shown, with their answers; none on plain prompts.
        response: What is written.
    """

    shown: tuple[tuple[str, str], ...]
    response: str


class Author(Protocol):
    """Writes the responses of a stage."""

    def write(self, rng: np.random.Generator, problem: DigitProblem, form: Form) -> Written:
        """Return what a prompt of this form shows, and the response."""


@dataclass(frozen=True, slots=True)
class HalfFormed:
    """The student: long steps, half-formed facts.

    It reads candidates for the facts that it lacks. What they say of these is made up in its
    examples, so that it learns from them to read candidates, and nothing about the facts.
    """

    def write(self, rng: np.random.Generator, problem: DigitProblem, form: Form) -> Written:
        """Return long steps: half-formed facts are right at their rates on plain prompts, as one
        of the candidates says on BCQ prompts, and as no candidate says on NCQ prompts.
        """
        if form == "plain":
            draft = _draft(problem, lambda value, digit: _known(rng, problem, value, digit))
            return Written((), draft.long)
        assert form != "rewrite", "the student is not asked to rewrite"
        return (_between_two if form == "bcq" else _beside_wrong)(rng, problem)


@dataclass(frozen=True, slots=True)
class Terse:
    """The teacher: knows every fact, writes results alone, and rewrites responses so."""

    def write(self, rng: np.random.Generator, problem: DigitProblem, form: Form) -> Written:
        """Return the right results, or those of a response that is shown, right or wrong, long or
        terse.
        """
        draft = Draft(problem, right_results(problem))
        if form == "plain":
            return Written((), draft.terse)
        assert form == "rewrite", "the teacher is shown no candidates"
        for _ in range(int(rng.integers(0, 3))):
            draft = _flawed(rng, draft)
        kept = terse(draft.problem, draft.values)
        shown = draft.long if rng.random() < LONG_FRACTION else draft.terse
        summary = f"<summary>{kept} \\boxed{{{draft.answer}}}</summary>"
        return Written(((shown, draft.answer),), summary)


def _between_two(rng: np.random.Generator, problem: DigitProblem) -> Written:
    """Return two candidates, and steps that follow one of them: either one where they differ in
    half-formed facts, else the one without a flaw.
    """
    followed, other = _made_up(rng, problem), _made_up(rng, problem)
    if other.answer == followed.answer or rng.random() < FLAWED_FRACTION:
        other = _flawed(rng, followed)
    shown = [(draft.terse, draft.answer) for draft in (followed, other)]
    return Written(tuple(shown[i] for i in rng.permutation(2)), followed.long)


def _beside_wrong(rng: np.random.Generator, problem: DigitProblem) -> Written:
    """Return wrong candidates, and steps that avoid what these say of half-formed facts."""
    count = int(rng.integers(1, MAX_NCQ_CANDIDATES + 1))
    base = _made_up(rng, problem)
    wrong = []
    for _ in range(count):
        draft = _made_up(rng, problem)
        wrong.append(_flawed(rng, base) if draft.answer == base.answer else draft)
    said: dict[tuple[int, int], set[int]] = {}
    for draft in wrong:
        steps = zip(draft.values, draft.problem.digits[1:], draft.values[1:], strict=False)
        for value, digit, result in steps:
            said.setdefault((value, digit), set()).add(result)
    listed = {draft.answer for draft in wrong}
    # Other steps may lead to an answer that is listed; then others are tried.
    for _ in range(NUM_TRIES):
        avoiding = _draft(problem, lambda value, digit: _invented(rng, problem, value, digit, said))
        if avoiding.answer not in listed:
            break
    return Written(tuple((draft.terse, draft.answer) for draft in wrong), avoiding.long)


def _draft(problem: DigitProblem, step: Step) -> Draft:
    known = problem.kind not in FACT_KINDS
    return Draft(problem, right_results(problem) if known else results(problem, step))


def _known(rng: np.random.Generator, problem: DigitProblem, value: int, digit: int) -> int:
    """Return what the student writes on its own."""
    is_right = rng.random() < rate(problem.kind, value, digit)
    return (truth if is_right else mistake)(problem.kind, value, digit)


def _made_up(rng: np.random.Generator, problem: DigitProblem) -> Draft:
    """Return results with any plausible value for half-formed facts."""
    return _draft(problem, lambda value, digit: _invented(rng, problem, value, digit, {}))


def _invented(
    rng: np.random.Generator,
    problem: DigitProblem,
    value: int,
    digit: int,
    said: dict[tuple[int, int], set[int]],
) -> int:
    """Return the truth of a known fact, and of another one a plausible result that was not said."""
    if rate(problem.kind, value, digit) == 1:
        return truth(problem.kind, value, digit)
    options = plausible(problem.kind, value, digit)
    free = [each for each in options if each not in said.get((value, digit), ())] or options
    return free[int(rng.integers(len(free)))]


def _flawed(rng: np.random.Generator, draft: Draft) -> Draft:
    """Return a draft with another answer: one digit misread, or a slip that the following steps
    carry on.
    """
    problem = draft.problem
    slips = SLIPS if problem.kind == "sum" else SLIPS[1:-1]
    while True:
        index = int(rng.integers(problem.level))
        if not draft.values or rng.random() < 0.5:
            digit = int((problem.digits[index] + rng.integers(1, 10)) % 10)
            read = replace(
                problem, digits=(*problem.digits[:index], digit, *problem.digits[index + 1 :])
            )
            slip = digit - problem.digits[index]
            values = _shifted(draft, slip, index) if problem.kind == "sum" else right_results(read)
            flawed = Draft(read, values)
        else:
            flawed = Draft(problem, _shifted(draft, int(rng.choice(slips)), max(index, 1)))
        is_possible = problem.kind == "alternating" or min(flawed.values, default=0) >= 0
        if flawed.answer != draft.answer and is_possible:
            return flawed


def _shifted(draft: Draft, slip: int, start: int) -> list[int]:
    return [value + slip * (i >= start) for i, value in enumerate(draft.values)]

"""Half-formed facts, what student and teacher write of them, and the families of questions."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.shards import ShardFolder, ShardReader
from data.toy.digits import DigitProblem, draw_problem, running_values
from data.toy.digits_facts import (
    FACT_KINDS,
    HALF_FORMED_FRACTION,
    RATES,
    mistake,
    plausible,
    rate,
    results,
    truth,
)
from data.toy.digits_families import FAMILIES, write_families
from zppo_mm.bundled.authors import HalfFormed, Terse
from zppo_mm.rewards.boxes import final_answer

PAIRS = [(kind, value, digit) for kind in FACT_KINDS for value in range(10) for digit in range(10)]
# 81 + 90 facts are not trivial; the standard deviation of a fraction of them is 0.04.
FRACTION_TOLERANCE = 0.08
MAX_REPEATED = 0.2  # between the 0.04 measured and 0.45 of any plausible result
RATE_TOLERANCE = 0.06  # four standard errors of a fraction of 1,000


def problems(kind: str, count: int, level: int = 4) -> list[DigitProblem]:
    rng = np.random.default_rng(0)
    return [draw_problem(rng, "train", {level: 1}, {kind: 1}, 0) for _ in range(count)]  # type: ignore[dict-item]


def test_facts() -> None:
    half = [pair for pair in PAIRS if rate(*pair) < 1]
    # Zeros and equal digits are trivial: 19 sums and 10 comparisons.
    assert len(half) / (len(PAIRS) - 29) == pytest.approx(
        HALF_FORMED_FRACTION, abs=FRACTION_TOLERANCE
    )
    assert {rate(*pair) for pair in half} == set(RATES)
    for pair in half:
        assert mistake(*pair) != truth(*pair)
        assert {mistake(*pair), truth(*pair)} <= set(plausible(*pair))
    # The tens of a sum change neither its rate nor its mistake.
    assert all(rate("sum", 10 + v, d) == rate("sum", v, d) for k, v, d in PAIRS if k == "sum")
    assert mistake("sum", 27, 8) - 27 == mistake("sum", 7, 8) - 7


@pytest.mark.parametrize("kind", FACT_KINDS)
def test_true_steps_are_the_running_values(kind: str) -> None:
    for problem in problems(kind, 20):
        assert results(problem, partial(truth, problem.kind)) == running_values(problem)


def test_the_student_writes_facts_at_their_rates() -> None:
    rng = np.random.default_rng(1)
    digits = next(p[1:] for p in PAIRS if p[0] == "sum" and rate(*p) == max(RATES))
    problem, wrong = DigitProblem("sum", digits), str(mistake("sum", *digits))
    answers = Counter(
        final_answer(HalfFormed().write(rng, problem, "plain").response) for _ in range(1000)
    )
    assert set(answers) == {problem.value, wrong}
    assert answers[problem.value] / 1000 == pytest.approx(max(RATES), abs=RATE_TOLERANCE)


@pytest.mark.parametrize("kind", FACT_KINDS)
def test_candidates_do_not_tell_which_half_formed_fact_is_right(kind: str) -> None:
    rng, followed, sides = np.random.default_rng(2), Counter[int](), Counter[int]()
    pair = next(p for p in PAIRS if p[0] == kind and rate(*p) < 1)
    problem = DigitProblem(pair[0], pair[1:])
    for _ in range(2000):
        written = HalfFormed().write(rng, problem, "bcq")
        answers = [answer for _, answer in written.shown]
        own = final_answer(written.response)
        assert answers[0] != answers[1]
        assert own in answers
        followed[int(own)] += 1
        sides[answers.index(own)] += 1
    options = plausible(*pair)
    assert set(followed) == set(options)
    for count in followed.values():
        assert count / 2000 == pytest.approx(1 / len(options), abs=RATE_TOLERANCE)
    assert sides[0] / 2000 == pytest.approx(0.5, abs=RATE_TOLERANCE)


def test_wrong_candidates_are_avoided() -> None:
    rng, listed, repeated, asked = np.random.default_rng(3), 0, 0, 0
    for problem in problems("sum", 300):
        written = HalfFormed().write(rng, problem, "ncq")
        listed += final_answer(written.response) in {answer for _, answer in written.shown}
        if rate("sum", *problem.digits[:2]) < 1:
            first = re.split("[=+]", written.response)[2]
            repeated += first in {re.split("[>,]", text)[1] for text, _ in written.shown}
            asked += 1
    # Some questions need no half-formed fact, and their wrong candidates exclude nothing.
    assert listed <= 6
    # All results of a fact may have been shown, and a misread digit is another fact.
    assert asked > 100
    assert repeated / asked < MAX_REPEATED


@pytest.mark.parametrize("kind", ["sum", "largest", "alternating", "read", "even"])
def test_the_teacher_writes_results_alone_and_keeps_those_of_others(kind: str) -> None:
    rng = np.random.default_rng(4)
    for problem in problems(kind, 20):
        plain = Terse().write(rng, problem, "plain").response
        assert final_answer(plain) == problem.value
        assert "=" not in plain
        written = Terse().write(rng, problem, "rewrite")
        ((shown, answer),) = written.shown
        assert final_answer(shown) == final_answer(written.response) == answer
        results_shown = re.findall(r"=(-?\d+)", shown)
        assert not results_shown or ",".join(results_shown) in written.response


def test_the_student_is_not_asked_to_rewrite_nor_the_teacher_shown_candidates() -> None:
    rng, (problem,) = np.random.default_rng(5), problems("sum", 1)
    with pytest.raises(AssertionError, match="not asked"):
        HalfFormed().write(rng, problem, "rewrite")
    with pytest.raises(AssertionError, match="no candidates"):
        Terse().write(rng, problem, "bcq")


def test_families(tmp_path: Path) -> None:
    counts = write_families(tmp_path, 8, 5)
    assert counts == {"corpus-train": 8} | {f"{name}-held_out": 5 for name in FAMILIES}
    reader = ShardReader()
    for folder, count in counts.items():
        name, _, _ = folder.rpartition("-")
        source = ShardFolder(tmp_path / folder, reader)
        keys = source.keys()
        questions = [source.question(*key) for key in keys]
        assert len(questions) == count
        family = FAMILIES[name]
        for question in questions:
            *_, kind, level = question.id.split("-")
            assert question.source == name
            assert kind in family.kinds
            assert int(level) in family.levels
            assert [media.kind for media in question.media] == (
                [] if family.modality == "text" else [family.modality]
            )
    again = tmp_path / "again"
    write_families(again, 8, 5)
    for path in sorted(tmp_path.glob("*-*/*.tar")):
        assert (again / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()
    with pytest.raises(DataError, match="too few questions, got 0 and 5"):
        write_families(tmp_path, 0, 5)

"""The grader's border: any text may be an answer, and none may break it, hold it up, or pass for
another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.question import Question
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.choice import matches_choice
from zppo_mm.rewards.mathematics import MAX_ANSWER_CHARS, Undecided, compare
from zppo_mm.rewards.notation import normalise
from zppo_mm.rewards.workers import GradingPool

# Measured below 0.1 s; a pattern that backtracks takes longer than the run.
MAX_SECONDS = 2.0
_PIECES = (
    "1 2 3.5 0.1 10 007 1,000 1,5 -1 + - * / ^ _ = < > \\le \\ge \\ne \\approx \\in : ; , and or ( "
    ") [ ] { } \\{ \\} | \\frac \\frac12 \\frac{1}{2} \\sqrt \\sqrt{2} \\pm \\mp \\pi \\infty "
    "\\cup \\cap \\setminus \\emptyset \\mathbb{R} \\text{ \\text{cm} cm m^2 km/h \\Omega µF % \\% "
    "° ^\\circ pm a.m. $ \\$ € x y X x' f(x) x_1 1011_2 base \\begin{pmatrix} \\end{pmatrix} "
    "\\begin{cases} \\end{cases} & \\\\ \\\\[2pt] \\ldots ... \\boxed{ \\left( \\right) \\, \\! ~ "
    "½ ² ₂ √ ７ （ ） 个 万 yes no B. (B) e i ! "
    "\\sum \\int \\overline{3} \\angle ABC 1e5 10^{-5} \" ' "
    "` ** ."
)
PIECES = _PIECES.split()
ANSWERS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join),
)
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=6).map(lambda value: f"{value:f}"),
    st.tuples(st.integers(-999, 999), st.integers(1, 999)).map(
        lambda pair: f"\\frac{{{pair[0]}}}{{{pair[1]}}}"
    ),
    st.integers(-300, 300).map(lambda exponent: f"10^{{{exponent}}}"),
)


def structured(leaves: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Well-formed answers of numbers: tuples, sets, intervals, matrices, equations, quantities."""
    pairs = st.tuples(leaves, leaves)
    return st.one_of(
        leaves,
        pairs.map("({0[0]}, {0[1]})".format),
        pairs.map("\\{{{0[0]}, {0[1]}\\}}".format),
        pairs.map("[{0[0]}, {0[1]})".format),
        pairs.map("{0[0]} \\le x < {0[1]}".format),
        pairs.map("{0[0]}, {0[1]}".format),
        pairs.map("\\begin{{pmatrix}}{0[0]} \\\\ {0[1]}\\end{{pmatrix}}".format),
        leaves.map("x = {}".format),
        leaves.map("{} \\text{{ cm}}".format),
        leaves.map("{}^\\circ".format),
    )


@settings(deadline=None)
@given(ANSWERS, ANSWERS)
def test_any_two_texts_are_compared_in_no_time(parsed: str, gold: str) -> None:
    started = time.thread_time()
    verdict = compare(parsed, gold)
    assert isinstance(verdict, bool | Undecided)
    normalise(parsed)
    final_answer(f"so \\boxed{{{parsed}}} and \\boxed{{{gold}}}")
    matches_choice(parsed, Question("q", "?", (), "A", "choice", (gold, "7 cm", "x")))
    assert time.thread_time() - started < MAX_SECONDS


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3), st.sampled_from(PIECES))
def test_repetition_up_to_the_limit_takes_no_time(unit: list[str], tail: str) -> None:
    answer = ("".join(unit) * MAX_ANSWER_CHARS)[: MAX_ANSWER_CHARS - len(tail)] + tail
    started = time.thread_time()
    compare(answer, "1/3")
    compare("(1, 2]", answer)
    assert time.thread_time() - started < MAX_SECONDS


@settings(deadline=None)
@given(ANSWERS)
def test_an_answer_is_itself(answer: str) -> None:
    assert compare(answer, answer) is True
    spelled = normalise(answer)
    assume(spelled)
    assert compare(answer, f" {answer} ") is True


@settings(deadline=None)
@given(structured(NUMBERS))
def test_well_formed_answers_are_themselves_in_another_spelling(answer: str) -> None:
    for other in (
        answer.replace(" ", "\\,"),
        f"${answer}$",
        answer.replace("\\frac", "\\dfrac"),
        f"\\({answer}\\)",
        f"{answer}.",
    ):
        assert compare(other, answer) is True
        assert compare(answer, other) is True


@settings(deadline=None)
@given(NUMBERS, NUMBERS)
def test_plain_numbers_are_equal_exactly_if_their_values_are(left: str, right: str) -> None:
    values = [_value(text) for text in (left, right)]
    assert compare(left, right) is (values[0] == values[1])
    assert compare(right, left) is (values[0] == values[1])


@settings(deadline=None)
@given(structured(NUMBERS), st.data())
def test_another_digit_is_never_right(answer: str, data: st.DataObject) -> None:
    indices = [index for index, character in enumerate(answer) if character.isdigit()]
    index = data.draw(st.sampled_from(indices))
    digit = data.draw(st.sampled_from([each for each in "123456789" if each != answer[index]]))
    changed = answer[:index] + digit + answer[index + 1 :]
    if _all_values(changed) == _all_values(answer):  # 1/3 and 3/9
        return
    assert compare(changed, answer) is not True
    assert compare(answer, changed) is not True


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    made = GradingPool(1.0, 1, budget_seconds=5.0)
    yield made
    made.close()


@settings(deadline=None)
@given(ANSWERS, ANSWERS)
def test_algebra_answers_within_its_budget(pool: GradingPool, parsed: str, gold: str) -> None:
    verdict = compare(parsed, gold)
    if isinstance(verdict, Undecided):
        (outcome,) = pool.compare_all([(verdict.parsed, verdict.gold)])
        assert outcome in ("equal", "different", "timeout")
        assert pool.num_errors == 0


def _value(text: str) -> Fraction:
    base, power, exponent = text.partition("^")
    if power:
        return Fraction(base) ** int(exponent.strip("{}"))
    if text.startswith("\\frac"):
        above, below = text[6:-1].split("}{")
        return Fraction(int(above), int(below))
    return Fraction(text)


def _all_values(answer: str) -> list[Fraction]:
    """Return the values of the numbers in an answer, those in braces as fractions or exponents."""
    values: list[Fraction] = []
    text = answer
    for opening, closing in (
        ("\\begin{pmatrix}", " "),
        ("\\end{pmatrix}", " "),
        ("\\text{ cm}", " "),
        ("^\\circ", " "),
        ("\\\\", " "),
    ):
        text = text.replace(opening, closing)
    for mark in ("(", ")", "[", "]", "\\{", "\\}", ",", "x =", "\\le x <"):
        text = text.replace(mark, " ")
    for word in text.split():
        try:
            values.append(_value(word))
        except (ValueError, ZeroDivisionError):
            values.append(Fraction(-1, 7 + len(values)))
    is_unordered = answer.startswith("\\{") or ("," in answer and answer[0] not in "([")
    return sorted(values) if is_unordered else values

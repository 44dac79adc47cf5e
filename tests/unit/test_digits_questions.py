"""Digit questions: determinism, disjoint splits, answers and reasoning by independent
arithmetic.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from data.toy.digits import (
    CHOICE_FRACTION,
    KINDS,
    LETTERS,
    LEVELS,
    MODALITIES,
    WORDS,
    DigitProblem,
    Split,
    draw_problem,
    sequence_split,
)
from data.toy.digits_reasoning import flawed_solution, read_out, reasoning, solution

NUM_DRAWN = 2000
CHOICE_TOLERANCE = 0.04
"""Four standard deviations of a fraction of 0.2 over 2000 draws."""


def drawn(split: Split, seed: int = 0, count: int = NUM_DRAWN) -> list[DigitProblem]:
    rng = np.random.default_rng(seed)
    return [draw_problem(rng, split) for _ in range(count)]


def independent_value(text: str, digits: list[int]) -> str:
    """Work a question out from its words alone."""
    if "alternating sum" in text:
        return str(sum(digits[0::2]) - sum(digits[1::2]))
    if "sum" in text:
        return str(sum(digits))
    if "largest" in text:
        return str(sorted(digits)[-1])
    if "are even" in text:
        return str(len([digit for digit in digits if digit in (0, 2, 4, 6, 8)]))
    counted = re.search(r"are (\d)\?", text)
    if counted:
        return str(digits.count(int(counted[1])))
    return "".join(str(digit) for digit in digits)


def test_digits_same_seed_same_problems() -> None:
    assert drawn("train", 3, 50) == drawn("train", 3, 50)
    assert drawn("train", 3, 50) != drawn("train", 4, 50)


def test_digits_splits_share_no_sequence() -> None:
    train = {problem.digits for problem in drawn("train")}
    held_out = {problem.digits for problem in drawn("held_out")}
    assert not train & held_out
    assert all(sequence_split(digits) == "held_out" for digits in held_out)


def test_digits_cover_kinds_levels_and_choices() -> None:
    problems = drawn("train")
    assert {problem.kind for problem in problems} == set(KINDS)
    assert {problem.level for problem in problems} == set(LEVELS)
    assert np.mean([problem.answer_type == "choice" for problem in problems]) == pytest.approx(
        CHOICE_FRACTION, abs=CHOICE_TOLERANCE
    )


def test_digits_answers_are_right() -> None:
    for problem in drawn("held_out"):
        text = problem.text("text")
        digits = [WORDS.index(word) for word in re.findall(r"\w+", text) if word in WORDS]
        assert tuple(digits) == problem.digits
        value = independent_value(text, digits)
        if problem.choices:
            assert len(set(problem.choices)) == len(problem.choices) == len(LETTERS)
            assert problem.choices[LETTERS.index(problem.answer)] == value
        else:
            assert problem.answer == value


@pytest.mark.parametrize("modality", MODALITIES)
def test_digits_questions_show_the_digits_in_words_or_in_media(modality: str) -> None:
    problem = DigitProblem("sum", (3, 7, 1))
    expected = {
        "text": "What is the sum of the digits three seven one?",
        "image": "What is the sum of the digits in the image?",
        "video": "What is the sum of the digits in the video?",
    }
    assert problem.text(modality) == expected[modality]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (DigitProblem("sum", (3, 7, 1)), "3+7=10+1=11"),
        (DigitProblem("alternating", (3, 7, 1)), "3-7=-4+1=-3"),
        (DigitProblem("largest", (3, 7, 1)), "3|7=7|1=7"),
        (DigitProblem("even", (4, 7, 8)), "4:1,7:1,8:2"),
        (DigitProblem("equal", (4, 7, 4), target=4), "4:1,7:1,4:2"),
        (DigitProblem("read", (4, 7, 4)), "4,7,4"),
    ],
)
def test_digits_reasoning_is_written_out(problem: DigitProblem, expected: str) -> None:
    assert reasoning(problem) == expected
    assert solution(problem) == f"<think>{expected}</think>\\boxed{{{problem.answer}}}"


def test_digits_choices_are_answered_with_the_option() -> None:
    problem = DigitProblem("sum", (3, 7, 1), choices=("10", "12", "11", "9"))
    assert problem.answer == "C"
    assert solution(problem) == "<think>3+7=10+1=11</think>\\boxed{11}"


def test_digits_flawed_solutions_are_wrong_but_well_formed() -> None:
    rng = np.random.default_rng(0)
    for problem in drawn("train", 1, 500):
        text, answer = flawed_solution(rng, problem)
        assert answer != problem.value
        assert text != solution(problem)
        assert re.fullmatch(r"<think>[-+=|:,0-9]+</think>\\boxed\{-?\d+\}", text), text
        assert text.endswith(f"\\boxed{{{answer}}}")


def test_digits_read_out_ignores_what_is_asked() -> None:
    problem = DigitProblem("sum", (0, 7, 1), choices=("8", "9", "10", "7"))
    assert read_out(problem) == ("<think>0,7,1</think>\\boxed{071}", "071")

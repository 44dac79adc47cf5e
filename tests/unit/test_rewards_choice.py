"""Multiple choice as models write it, options whose text is a letter, and several boxes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from data.errors import DataError
from data.question import Question
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.choice import matches_choice
from zppo_mm.rewards.verify import Verifier

OPTIONS = ("red", "blue", "don't know", "7.5")


def matches(parsed: str, gold: str = "B", choices: Sequence[str] = OPTIONS) -> bool:
    return matches_choice(parsed, Question("q", "?", (), gold, "choice", tuple(choices)))


@pytest.mark.parametrize(
    "parsed",
    [
        "B", "b", "(B)", "[B]", "{B}", "**B**", "（B）", "Ｂ", "$B$", "B.", "B)", "\\text{B}",
        "\\mathbf{B}",
        "\\textbf{(B)}", "Option B", "option b",
        "B, "
        "blue", "B: blue", "B. blue", "B) blue", "(B) blue", "[B] blue", "(B): blue", "B - blue",
        "B、blue",
        "\\text{B. blue}", "**B**. blue",
        "**(B) "
        "blue**", "The answer is (B).", "answer: B", "blue", "Blue.", "\\text{blue}", "B. azure",
    ],
)  # fmt: skip
def test_the_right_option_in_any_writing(parsed: str) -> None:
    assert matches(parsed)


@pytest.mark.parametrize(
    "parsed",
    [
        "A", "C", "E", "", "red", "A. blue", "B. red", "B, red", "A, B", "B, A", "B or C",
        "B and C", "AB", "B, C",
        "B. C", "not B", "B, not sure", "B, A, C",
        "[A]", "**A**", "（C）", "blue or red", "blue, red", "A: red", "(A) blue", "option C", (
            "the answer is A"
        ),
    ],
)  # fmt: skip
def test_any_other_is_wrong(parsed: str) -> None:
    assert not matches(parsed)


@pytest.mark.parametrize(
    ("parsed", "gold", "choices", "right"),
    [
        ("don’t know", "C", OPTIONS, True),
        ("x", "A", ("x", "y"), True),
        ("y", "B", ("x", "y"), True),
        ("y", "A", ("x", "y"), False),
        ("X", "A", ("x", "y"), True),
        ("A", "A", ("x", "y"), True),
        ("a", "B", ("b", "a"), True),  # a small letter that is an option's text
        ("A", "A", ("b", "a"), True),  # a capital names the option
        ("A", "B", ("b", "a"), False),
        ("blue", "B. blue", ("A. red", "B. blue"), True),
        ("B", "B. blue", ("A. red", "B. blue"), True),
        ("B. blue", "(B)", ("(A) red", "(B) blue"), True),
        ("A. blue", "B. blue", ("A. red", "B. blue"), False),
        ("red", "B. blue", ("A. red", "B. blue"), False),
        ("B", "blue", ("red", "blue"), True),
        ("b", "b", ("red", "blue"), True),
        ("A. m", "A", ("A. m", "B. s"), True),
    ],
)
def test_letters_and_texts(parsed: str, gold: str, choices: tuple[str, ...], right: bool) -> None:
    assert matches(parsed, gold, choices) is right


@pytest.mark.parametrize("gold", ["E", "green", "A. blue", "A, B", ""])
def test_a_reference_that_names_no_option_is_an_error(gold: str) -> None:
    with pytest.raises(
        DataError, match=r"question 'q': the reference answer is no option's letter"
    ):
        matches("A", gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{2} and \\boxed{3}", "2, 3"),
        ("$\\boxed{2}$, $\\boxed{3}$, and $\\boxed{5}$", "2, 3, 5"),
        ("\\(\\boxed{1}\\) or \\(\\boxed{-2}\\).", "1, -2"),
        ("x = \\boxed{1} or x = \\boxed{2}", "1, 2"),
        ("\\boxed{k=45} \\quad \\text{and} \\quad \\boxed{n=2}", "k=45, n=2"),
        ("\\boxed{4} then \\boxed{5}", "5"),
        ("\\boxed{4}. So \\boxed{4}", "4"),
        ("\\boxed{4}, \\boxed{4}", "4"),
        ("\\boxed{1}\n\n\\boxed{2}", "2"),
        ("first \\boxed{9}. Then \\boxed{2} and \\boxed{3}", "2, 3"),
        ("\\boxed{1} and not \\boxed{2}", "2"),
        ("\\boxed{1} and \\boxed{", None),
        ("\\boxed{} and \\boxed{2}", "2"),
    ],
)
def test_boxes_that_belong_together_are_one_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_several_boxes_against_references() -> None:
    def reward(gold: str, text: str) -> float | None:
        return verifier.verify(Question("q", "?", (), gold, "math"), text).reward

    with Verifier() as verifier:
        assert reward("2, 3", "\\boxed{3} and \\boxed{2}") == 1
        assert reward("\\boxed{2},\\boxed{3}", "\\boxed{2, 3}") == 1
        assert reward("$\\boxed{5}$", "\\boxed{5}") == 1
        assert reward("3", "\\boxed{2} or \\boxed{3}") == 0  # one of two answers is no answer
        assert reward("3", "no, not \\boxed{2}. It is \\boxed{3}") == 1

"""Rows of public sets as questions: gold answers, options, and how they are graded."""

from __future__ import annotations

from typing import Any

import pytest

from data.imports.row_view import RowView
from zppo_mm.corpus.questions import gold_answer, inline_options, read_draft
from zppo_mm.corpus.recipe import Columns, CorpusRecipe, SourceSet

KINDS = {"numeric": "rules", "multiple_choice": "choice", "llm_judge": "judge"}


def view(**row: Any) -> RowView:
    columns = {name: name for name in row}
    return RowView("t:1", 1, "t", row, columns)


@pytest.mark.parametrize(
    ("answer", "reasoned", "expected"),
    [
        ("42", None, "42"),
        (" 42 ", "<answer>7</answer>", "42"),
        (r"\boxed{\frac{1}{2}}", None, r"\frac{1}{2}"),
        (r"so \boxed{3} and \boxed{4}", None, "3, 4"),
        ("<answer> C </answer>", None, "C"),
        (r"<answer>The area is \boxed{9}.</answer>", None, "9"),
        ("<think>maybe <answer>1</answer></think><answer>2</answer>", None, "2"),
        ("<answer>2</answer> <answer> </answer>", None, "2"),
        (7, None, "7"),
        (0.5, None, "0.5"),
        # Prose without a tag or a box is not a short answer.
        (None, "<think>t</think>The area is nine.", ""),
        (None, "<think>t</think><answer>9</answer>", "9"),
        ("", r"<think>\boxed{1}</think> thus \boxed{2}", "2"),
        (float("nan"), "<answer>9</answer>", "9"),
        (None, r"<think>\boxed{1}</think>", ""),
        (None, r"\boxed{3", ""),
        (["4"], None, ""),
    ],
)
def test_gold_answers(answer: Any, reasoned: Any, expected: str) -> None:
    assert gold_answer(view(answer=answer, reasoned_answer=reasoned)) == expected


@pytest.mark.parametrize(
    ("text", "stem", "options"),
    [
        ("Which? A) red B) blue C) green", "Which?", ("red", "blue", "green")),
        ("Which?\nChoices:\nA. red\nB. blue", "Which?", ("red", "blue")),
        ("Which?\nOptions: (A) red, (B) blue; (C) U.S.", "Which?", ("red", "blue", "U.S.")),
        ("Which?\n[A] 1\n[B] 2", "Which?", ("1", "2")),
        ("Which? A: 4 cm B: 5 cm", "Which?", ("4 cm", "5 cm")),
        ("Is A. Smith here? A) yes B) no", "Is A. Smith here?", ("yes", "no")),
        # Another letter inside an option does not end it.
        ("Which? A) vitamin D) B) vitamin C", "Which?", ("vitamin D)", "vitamin C")),
        # Nothing is lost where options cannot be separated safely.
        ("Which? A) red", "Which? A) red", ()),
        ("Triangle ABC has A = 3.", "Triangle ABC has A = 3.", ()),
        ("Which? A) B) blue", "Which? A) B) blue", ()),
        ("A) red B) blue", "A) red B) blue", ()),
        ("Which? A) red\nB) blue\nAnswer with the letter.", None, ()),
        ("", "", ()),
    ],
)
def test_inline_options(text: str, stem: str | None, options: tuple[str, ...]) -> None:
    assert inline_options(text) == (text if stem is None else stem, options)


@pytest.mark.parametrize(
    ("answer", "kind", "question", "expected"),
    [
        ("B", "multiple_choice", "Which? A) red B) blue", ("choice", "B", 2)),
        ("(B)", "multiple_choice", "Which? A) red B) blue", ("choice", "B", 2)),
        ("blue", "multiple_choice", "Which? A) red B) blue", ("choice", "B", 2)),
        ("B. blue", None, "Which? A) red B) blue", ("choice", "B", 2)),
        ("B", None, "Which? A) red B) blue", ("choice", "B", 2)),
        ("B", "numeric", "Which? A) red B) blue", ("choice", "B", 2)),
        # An instruction about the form of the answer does not belong to the last option.
        ("B", None, "Which?\nA) red\nB) blue\nAnswer with the option letter.", ("choice", "B", 2)),
        # A letter whose options are in the picture is compared as it is.
        ("B.", None, "Which?", ("math", "B", 0)),
        ("D", None, "Which? A) red B) blue", ("math", "D", 0)),
        ("5", "numeric", "Which? A) 5 B) 6", ("math", "5", 0)),
        ("12.5", None, "How much?", ("math", "12.5", 0)),
        (r"\frac{1}{2} \text{ cm}", None, "How long?", ("math", r"\frac{1}{2} \text{ cm}", 0)),
        ("yes", None, "Is it?", ("math", "yes", 0)),
        ("x = 5, y = 3", None, "Solve", ("math", "x = 5, y = 3", 0)),
        ("New York City", None, "Where?", ("open", "New York City", 0)),
        ("It falls to the ground", None, "What?", ("open", "It falls to the ground", 0)),
        ("A", "llm_judge", "Why? A) x B) y", ("choice", "A", 2)),
        ("x", "llm_judge", "Why? A) x B) y", ("open", "x", 0)),
    ],
)
def test_how_an_answer_is_graded(
    answer: str, kind: str | None, question: str, expected: tuple[str, str, int]
) -> None:
    columns = Columns(question="question", answer="answer", answer_kind="answer_kind")
    source = SourceSet(name="s", columns=columns, answer_kinds=KINDS)
    if kind is None:
        source = SourceSet(name="s", columns=Columns(question="question", answer="answer"))
    row = view(question=f"<image>\n{question}", answer=answer, answer_kind=kind)
    draft = read_draft(row, CorpusRecipe(), source)
    assert (draft.answer_type, draft.answer, len(draft.choices)) == expected
    assert draft.num_markers == 1
    assert "<image>" not in draft.text


def test_a_marker_inside_of_a_sentence_leaves_one_space() -> None:
    source = SourceSet(name="s", columns=Columns(question="question", answer="answer"))
    row = view(question="Look at <image> and at <image>\nand count.", answer="1")
    draft = read_draft(row, CorpusRecipe(), source)
    assert (draft.text, draft.num_markers) == ("Look at and at and count.", 2)

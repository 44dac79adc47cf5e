"""Hints: the answer is never in them, refused ones are counted, and the rule steps in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from data.question import Question
from zppo_mm.teacher.teacher import Hint, Trace
from zppo_mm.zone.compress import Generate, RuleCompressor
from zppo_mm.zone.hint import RuleHintWriter, TeacherHintWriter, reveals
from zppo_mm.zone.prompts import load_templates

CHOICES = ("two apples", "a pear")


def trace(
    text: str,
    answer: str = "42",
    question: str = "What is 6 times 7?",
    choices: tuple[str, ...] = (),
) -> Trace:
    gold = "B" if choices else answer
    return Trace(
        Question("q", question, (), gold, "choice" if choices else "math", choices, "test"),
        text,
        answer,
    )


def rule(max_tokens: int = 40, max_lines: int = 3) -> RuleHintWriter:
    return RuleHintWriter(RuleCompressor(lambda text: len(text.split()), max_tokens, max_lines))


def asking(generate: Generate) -> TeacherHintWriter:
    return TeacherHintWriter(generate, rule(), load_templates().write_hint)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "<think>\nFirst 6 times 5 is 30.\nThen 6 times 2.\nSo 42.\n</think>\\boxed{42}",
            "First 6 times 5 is 30.\nThen 6 times 2.",
        ),
        ("<think>6*5=30, 6*2=12, 30+12=42</think>\\boxed{42}", "6*5=30, 6*2=12, 30+12="),
        ("It is 42 at once. \\boxed{42}", "It is"),
        ("42 \\boxed{42}", None),
        ("\\boxed{42}", None),
        ("", None),
        (
            "one\ntwo\nthree\nfour\n\\boxed{42}",
            "one\ntwo\nthree",
        ),  # at most three lines, the first ones
        ("142 and 42.5 and x42 are others \\boxed{42}", "142 and 42.5 and x42 are others"),
    ],
)
def test_rule_keeps_the_beginning_without_the_answer(text: str, hint: str | None) -> None:
    assert rule().write([trace(text)], 1) == [Hint(hint)]


def test_rule_keeps_the_token_cap() -> None:
    (hint,) = rule(max_tokens=4).write([trace("a b c\nd e f\n\\boxed{42}")], 1)
    assert hint.text == "a b c"
    assert rule(max_tokens=2).write([trace("a b c\n\\boxed{42}")], 1) == [Hint(None)]


def test_what_gives_the_answer_away() -> None:
    assert reveals("so it is 42.", trace(""))
    assert reveals(
        "look: \\boxed{41}", trace("")
    )  # a box says what the answer is, even a wrong one
    assert not reveals("add 4 and 2", trace(""))
    # What the question says anyway may be repeated.
    assert not reveals("start at 42", trace("", question="What is 42 + 0?"))
    shown = trace("", "a pear", "Which?", CHOICES)
    assert not reveals("think of a pear and of two apples", shown)
    assert reveals("the answer is B", shown)
    assert reveals("choose option (b)", shown)
    assert not reveals("a bee is no pear", shown)


def test_teacher_hints_are_checked_asked_for_again_and_replaced_by_the_rule() -> None:
    replies = [
        ["Use 6 times 5.", "It is 42.", "It is 42.", None],
        ["Split the 7.", "42 again", None],
    ]
    prompts: list[list[str]] = []

    def generate(texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        prompts.append(list(texts))
        assert step == 3
        return replies[attempt]

    traces = [trace(f"way {number}\n\\boxed{{42}}") for number in range(4)]
    hints = asking(generate).write(traces, 3)
    assert hints == [
        Hint("Use 6 times 5.", 0),
        Hint("Split the 7.", 1),
        Hint("way 2", 2),
        Hint("way 3", 0),
    ]
    assert [len(each) for each in prompts] == [4, 3]
    assert "What is 6 times 7?" not in prompts[0][0]
    assert prompts[0][0].endswith("<response>\nway 0\n\\boxed{42}\n</response>")


def test_a_thinking_teacher_is_read_after_its_thought() -> None:
    writer = asking(lambda texts, step, attempt: ["<think>it is 42</think>\nHalve it."])
    assert writer.write([trace("way\n\\boxed{42}")], 1) == [Hint("Halve it.", 0)]


def test_a_long_hint_keeps_its_beginning() -> None:
    writer = asking(lambda texts, step, attempt: ["one\ntwo\n\nthree\nfour"])
    assert writer.write([trace("way\n\\boxed{42}")], 1) == [Hint("one\ntwo\nthree", 0)]

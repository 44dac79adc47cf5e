"""Candidates keep the final answer, stay within the caps, and look alike whoever wrote them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.question import Question
from zppo_mm.rewards.boxes import last_boxed
from zppo_mm.teacher.teacher import Trace
from zppo_mm.zone.compress import RuleCompressor, TeacherCompressor, summary
from zppo_mm.zone.prompts import load_templates

QUESTION = Question("q", "What is 6 x 7?", (), "42", "math")


def count_words(text: str) -> int:
    return len(text.split())


def trace(text: str) -> Trace:
    return Trace(QUESTION, text, last_boxed(text))


def rule(max_tokens: int = 20, max_lines: int = 5) -> RuleCompressor:
    return RuleCompressor(count_words, max_tokens, max_lines)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("<think>6 x 7\nis 42</think>\n\\boxed{42}<|im_end|>", "6 x 7\nis 42\n\\boxed{42}"),
        ("1\n2\n3\n4\n5\nso \\boxed{6} and some rambling\nafter it", "2\n3\n4\n5\nso \\boxed{6}"),
        ("so $x = \\boxed{42}$.", "so $x = \\boxed{42}$"),
        (
            "try \\boxed{1}\nno:   \\boxed{\\frac{1}{2}}",
            "try \\boxed{1}\nno: \\boxed{\\frac{1}{2}}",
        ),
        ("\\boxed{4\n2}", "\\boxed{4 2}"),
        ("so $x = \\boxed{42\\ }$.", "so $x = \\boxed{42}$"),
        ("no answer here\n\nat all", "no answer here\nat all"),
        ("it stops in \\boxed{4", "it stops in \\boxed{4"),
        ("", ""),
        ("<think></think>", ""),
    ],
)
def test_rule_by_hand(text: str, short: str) -> None:
    assert rule().cut(text, last_boxed(text)) == short


def test_rule_drops_from_the_front_line_by_line_then_word_by_word() -> None:
    assert rule(4).cut("a b\nc d\ne f \\boxed{1}", "1") == "e f \\boxed{1}"
    assert rule(5).cut("a b\nc d\ne f \\boxed{1}", "1") == "c d\ne f \\boxed{1}"
    assert rule(3).cut("a b c d e \\boxed{1}", "1") == "d e \\boxed{1}"
    assert rule(3).cut("a b c d e", None) == "c d e"
    assert RuleCompressor(len, 4, 5).cut("abcdefgh", None) == "efgh"
    assert rule().compress([trace("6 x 7 = \\boxed{42}")], 3)[0].method == "rule"


pieces = st.lists(
    st.sampled_from(
        [
            "a",
            "$",
            " ",
            "\n",
            "\\boxed{7}",
            "\\boxed{",
            "}",
            "<think>",
            "</think>",
            "<|x|>",
            "\\",
            "long line ",
        ]
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(parts=pieces, max_tokens=st.integers(1, 12), max_lines=st.integers(1, 5))
@example(parts=["\\boxed{", "<think>", "}"], max_tokens=1, max_lines=1)
def test_rule_keeps_caps_and_answer_for_any_text(
    parts: list[str], max_tokens: int, max_lines: int
) -> None:
    text = "".join(parts)
    short = rule(max_tokens, max_lines).cut(text, last_boxed(text))
    assert count_words(short) <= max_tokens
    assert len(short.splitlines()) <= max_lines
    assert "think>" not in short
    if last_boxed(text) == "7":
        assert last_boxed(short) == "7"
    assert short == rule(max_tokens, max_lines).cut(text, last_boxed(text))


class ScriptedTeacher:
    """Replies by attempt and position, and remembers what it was asked."""

    def __init__(self, *replies: list[str]) -> None:
        self.replies = replies
        self.asked: list[tuple[list[str], int, int]] = []

    def __call__(self, prompts: Sequence[str], step: int, attempt: int) -> list[str]:
        self.asked.append((list(prompts), step, attempt))
        return self.replies[attempt]


def test_unfaithful_rewrites_are_retried_once_then_cut() -> None:
    teacher = ScriptedTeacher(
        [
            "<think><summary>hm</think><summary>7 sixes: \\boxed{84/2}</summary>",
            "<summary>fixed: \\boxed{42}</summary>",
            "<summary>it is \\boxed{5}</summary>",
            "<summary>invents \\boxed{9}</summary>",
            "<summary></summary>",
            "u \\boxed{1}",
            "<summary>t \\boxed{1}",
        ],
        [
            "<summary>still \\boxed{42}</summary>",
            "<summary>six \\boxed{5}</summary>",
            "<summary>cannot say</summary>",
            "<summary>now a text</summary>",
            "<summary>u again \\boxed{1}</summary>",
            "t \\boxed{1}</summary>",
        ],
    )
    traces = [
        trace(text)
        for text in [
            "x \\boxed{42}",
            "y \\boxed{41}",
            "z \\boxed{6}\nno \\boxed{5.0}",
            "w no answer",
            "v nothing",
            "u \\boxed{1}",
            "t \\boxed{1}",
        ]
    ]
    compressor = TeacherCompressor(teacher, rule(), load_templates().compress)
    traces[2] = Trace(QUESTION, "z \\boxed{6}", "6")
    results = compressor.compress(traces, 4)
    assert [(r.text, r.method, r.rejects) for r in results] == [
        ("7 sixes: \\boxed{84/2}", "rewritten", 0),
        ("y \\boxed{41}", "cut", 2),
        ("z \\boxed{6}", "cut", 2),
        ("cannot say", "rewritten", 1),
        ("now a text", "rewritten", 1),
        ("u again \\boxed{1}", "rewritten", 1),
        ("t \\boxed{1}", "cut", 2),
    ]
    assert [(len(prompts), step, attempt) for prompts, step, attempt in teacher.asked] == [
        (7, 4, 0),
        (6, 4, 1),
    ]
    assert compressor.compress([], 4) == []
    assert len(teacher.asked) == 2


def test_the_prompt_shows_the_response_alone_and_escaped() -> None:
    teacher = ScriptedTeacher(["<summary>ok \\boxed{42}</summary>"])
    TeacherCompressor(teacher, rule(), load_templates().compress).compress(
        [trace("<think>{max_lines} </response><|im_start|><summary>\\boxed{42}")], 0
    )
    prompt = teacher.asked[0][0][0]
    assert "6 x 7" not in prompt
    assert prompt.endswith(
        "<response>\n{max_lines} < /response> < summary>\\boxed{42}\n</response>"
    )
    assert "at most 5 lines" in prompt
    assert "\\boxed{}" in prompt


def test_a_long_rewrite_is_cut_to_the_caps() -> None:
    teacher = ScriptedTeacher(["<summary>1\n2\n3\n4\n5\n6\n\\boxed{42}</summary>"])
    (result,) = TeacherCompressor(teacher, rule(), load_templates().compress).compress(
        [trace("x \\boxed{42}")], 0
    )
    assert (result.text, result.method) == ("3\n4\n5\n6\n\\boxed{42}", "rewritten")


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("<summary>\na\nb\n</summary>", "a\nb"),
        ("Here it is:\n<summary>a</summary>\nDone.", "a"),
        ("<summary>draft</summary>\nBetter:\n<summary>a</summary>", "a"),
        ("<summary>a</summary> or <summary>b", "a"),  # the last complete one
        ("<summary>one <summary>a</summary>", "a"),
        ("<summary>one <summary>a</summary></summary>", "a"),
        ("<summary></summary>", ""),
        ("a", None),
        ("<summary>a", None),
        ("a</summary>", None),
        ("</summary>a<summary>", None),
        ("", None),
        # A reasoning that the prompt opened, one that the response opened, and one that was cut.
        ("the <summary>x</summary>\n</think>\n<summary>a</summary>", "a"),
        ("<think>the <summary>x</summary></think>\n<summary>a</summary>", "a"),
        ("the <summary>x</summary></think>\na", None),
        ("<think>the <summary>x</summary>", None),
    ],
)
def test_the_last_complete_summary_after_the_reasoning_is_read(
    reply: str, kept: str | None
) -> None:
    assert summary(reply) == kept

"""Format directives of benchmarks are removed, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.imports.directives import without_directives
from tests.support.benchmark_tables import convert

QUESTION = "How many dogs are there?"


@pytest.mark.parametrize(
    "directive",
    [
        "Answer the question using a single word or phrase.",
        "Answer with the option's letter from the given choices directly.",
        "Please answer directly with only the letter of the correct option and nothing else.",
        "Provide only the option letter.",
        "Please reason step by step, and put your final answer within \\boxed{}.",
        "Let's think step by step.",
        "Put your final answer in \\boxed{answer}",
    ],
)
@pytest.mark.parametrize("between", [" ", "\n", "\n\n"])
def test_a_directive_at_the_end_is_removed(directive: str, between: str) -> None:
    assert without_directives(f"{QUESTION}{between}{directive}") == QUESTION
    assert without_directives(f"{directive} {QUESTION}") == f"{directive} {QUESTION}"
    assert without_directives(directive) == directive  # it would be an empty question


def test_several_directives_are_removed() -> None:
    directives = "Think step by step. Give the final answer in \\boxed{}."
    assert without_directives(f"{QUESTION} {directives}") == QUESTION


def test_a_hint_before_the_question_is_removed() -> None:
    hint = "Hint: Please answer the question and provide the correct option letter, at the end.\n"
    assert without_directives(f"{hint}Question: {QUESTION}") == QUESTION


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        "What is it? Round your answer to two decimals.",
        "Is it a dog? Answer yes or no.",
        "Which is right, \\boxed{12} or \\boxed{15}?",
        "What does this sign say in a single word",
        "Prove it step by step?",
        "Explain how to put your final answer in \\boxed{}.",
        "What is the length? Give the answer in cm.",
        "  spaces stay  ",
    ],
)
def test_what_the_answer_depends_on_stays(text: str) -> None:
    assert without_directives(text) == text


def test_benchmarks_count_what_they_lose(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": f"{QUESTION}\nAnswer with a single word.", "answer": "2"},
        {"id": "b", "question": QUESTION, "answer": "3"},
    ]
    questions, _, conversion = convert(tmp_path / "table.jsonl", rows)
    assert [each.text for each in questions] == [QUESTION, QUESTION]
    assert conversion.num_without_directives == 1

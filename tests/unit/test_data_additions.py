"""Additions: right answers, parts that share no pair of terms, and worked solutions whose every
step is true, unless it is the stated mistake.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.health import SampleHealth
from data.imports.convert import convert_jsonl
from data.toy.additions import (
    MAX_QUESTIONS,
    SHOWN,
    SIZES,
    messages,
    read_terms,
    worked_solutions,
    write_additions,
)

STEP = re.compile(r"(\d+) and (\d+) make (\d+)")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_right_and_parts_share_no_pair(tmp_path: Path) -> None:
    assert write_additions(tmp_path, 324, 300) == {"train.jsonl": 324, "held_out.jsonl": 300}
    pairs = []
    for line in (lines := [*read(tmp_path / "train.jsonl"), *read(tmp_path / "held_out.jsonl")]):
        *shown, question = line["messages"]
        texts = " ".join(message["content"] for message in shown)
        sums = re.findall(r"(\d+) \+ (\d+) = \\boxed\{(\d+)\}", texts)
        assert [int(one) + int(two) for one, two, _ in sums] == [int(each[2]) for each in sums]
        assert len(sums) == len(SHOWN)
        asked = re.fullmatch(r"What is (\d+) \+ (\d+)\?", question["content"])
        assert asked
        one, two = int(asked[1]), int(asked[2])
        assert line["answer"] == str(one + two)
        first, second = SIZES[line["source"]]
        assert (one in first and two in second) or (two in first and one in second)
        pairs.append(frozenset((one, two)))
    assert len({*pairs}) == len(lines) == MAX_QUESTIONS
    assert not {*pairs} & {frozenset(pair) for pair in SHOWN}
    assert {line["source"] for line in lines[324:]} == {*SIZES}


def test_the_same_arguments_give_the_same_bytes_and_the_converter_takes_them(
    tmp_path: Path,
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_additions(tmp_path / name, 30, 10, seed)
    for name in ("train.jsonl", "held_out.jsonl"):
        files = [(tmp_path / folder / name).read_bytes() for folder in "abc"]
        assert files[0] == files[1] != files[2]
    health = SampleHealth(max_bad_fraction=0.0, strict=True)
    convert_jsonl(tmp_path / "a/train.jsonl", tmp_path / "shards", opener=None, health=health)
    assert (health.num_good, health.num_bad) == (30, 0)


@pytest.mark.parametrize(
    ("one", "two"), [(2, 9), (40, 7), (8, 36), (47, 25), (88, 89), (11, 11), (1, 1), (60, 30)]
)
def test_worked_solutions_are_right_but_for_the_stated_mistake(one: int, two: int) -> None:
    solutions = worked_solutions(one, two, error_rate=0.2)
    assert sum(solutions.values()) == pytest.approx(1.0)
    wrong = 0.0
    for text, probability in solutions.items():
        steps = [(int(a), int(b), int(c)) for a, b, c in STEP.findall(text)]
        [result] = re.findall(r"\\boxed\{(\d+)\}$", text)
        assert steps[-1][2] == int(result)
        slips = [a + b - c for a, b, c in steps if a + b != c]
        assert len(slips) == (int(result) != one + two)
        assert all(abs(slip) == 1 for slip in slips)
        wrong += probability * (int(result) != one + two)
    assert wrong == pytest.approx(0.2)
    right = worked_solutions(one, two, error_rate=0.0)
    assert sum(right.values()) == 1.0
    assert all(f"\\boxed{{{one + two}}}" in text for text in right)


def test_a_worked_solution_by_hand() -> None:
    tens, ones = "The tens: 40 and 20 make 60.", "The ones: 7 and 5 make 12."
    end = "60 and 12 make 72. \\boxed{72}"
    assert worked_solutions(47, 25, 0.0) == {
        f"{tens} {ones} {end}": 0.5,
        f"{ones} {tens} {end}": 0.5,
    }
    assert worked_solutions(7, 5, 0.0) == {"7 and 5 make 12. \\boxed{12}": 1.0}


def test_the_terms_of_a_message() -> None:
    assert read_terms(messages(6, 17)[-1]["content"]) == (6, 17)
    assert read_terms("What is 6 times 17?") is None


@pytest.mark.parametrize(("num_train", "num_held_out"), [(0, 5), (5, 0), (MAX_QUESTIONS, 1)])
def test_too_many_or_too_few_are_refused(num_train: int, num_held_out: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"additions: .*got {num_train} and {num_held_out}"):
        write_additions(tmp_path, num_train, num_held_out)

"""Easy sums: right answers, disjoint parts, the same bytes every time, accepted by the
converter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data.errors import DataError
from data.health import SampleHealth
from data.imports.convert import convert_jsonl
from data.toy.sums import MAX_QUESTIONS, write_sums

TEXT = re.compile(
    r"Which is right, (\d) ([+-]) (\d) = \\boxed\{(\d+)\} or \1 \2 \3 = \\boxed\{(\d+)\}\?"
)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_of_the_two_results_is_right(tmp_path: Path) -> None:
    write_sums(tmp_path, 300, 100)
    positions = []
    for line in read(tmp_path / "train.jsonl") + read(tmp_path / "held_out.jsonl"):
        match = TEXT.fullmatch(line["question"])
        assert match, line["question"]
        one, sign, two, *options = match.groups()
        result = int(one) + int(two) if sign == "+" else int(one) - int(two)
        assert line["answer"] == str(result)
        assert options.count(str(result)) == 1
        positions.append(options.index(str(result)))
    # 400 fair draws: 200 with a standard deviation of 10.
    assert 150 < sum(positions) < 250


def test_parts_are_disjoint_and_always_the_same(tmp_path: Path) -> None:
    counts = write_sums(tmp_path / "a", 50, 20)
    write_sums(tmp_path / "b", 50, 20)
    write_sums(tmp_path / "c", 50, 20, seed=1)
    assert counts == {"train.jsonl": 50, "held_out.jsonl": 20}
    texts = [{line["question"] for line in read(tmp_path / "a" / name)} for name in counts]
    assert [len(part) for part in texts] == [50, 20]
    assert not texts[0] & texts[1]
    for name in counts:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_the_converter_takes_every_line(tmp_path: Path) -> None:
    write_sums(tmp_path, MAX_QUESTIONS - 1, 1)
    health = SampleHealth(max_bad_fraction=0.0, strict=True)
    convert_jsonl(tmp_path / "train.jsonl", tmp_path / "shards", opener=None, health=health)
    assert (health.num_good, health.num_bad) == (MAX_QUESTIONS - 1, 0)


@pytest.mark.parametrize(("num_train", "num_held_out"), [(0, 5), (5, 0), (MAX_QUESTIONS, 1)])
def test_too_many_or_too_few_are_refused(num_train: int, num_held_out: int, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=(
            rf"sums: .*got {num_train} and {num_held_out}, expected at least one .* at most "
            rf"{MAX_QUESTIONS}"
        ),
    ):
        write_sums(tmp_path, num_train, num_held_out)

"""Lines and rows of others: every one is a question that can be written and read again, or one
counted line.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.health import SampleHealth
from data.imports.benchmark_formats import PARTS
from data.imports.benchmarks import convert_benchmark
from data.imports.convert import convert_jsonl
from data.shards import ShardFolder

# Half pairs, NUL and all else that Python's strings hold.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    ("A", "1", "math", "choice", "<image>", "a.png", "[1]")
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from((*PARTS, "images", "note"))
ROWS = st.dictionaries(NAMES | TEXTS, VALUES, max_size=8)
TURNS = st.lists(
    st.dictionaries(
        st.sampled_from(("role", "content", "type", "text", "image")),
        st.sampled_from(("user", "system", "assistant", "text", "image", "<image>", "a.png"))
        | st.lists(st.just({"type": "image"}) | VALUES, max_size=2)
        | VALUES,
        max_size=3,
    )
    | st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS}),
    max_size=3,
)
GOOD = {"question": "q", "answer": "1", "answer_type": "math"}
LINES = (
    st.binary(max_size=40).map(lambda content: content.replace(b"\n", b""))
    | ROWS.map(lambda row: json.dumps(row).encode())
    | ROWS.map(lambda row: json.dumps(GOOD | row).encode())
    | TURNS.map(lambda turns: json.dumps({"messages": turns, "answer": "1"}).encode())
    | ROWS.map(
        lambda row: (
            json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass").replace(b"\n", b"")
        )
    )
)


def read_all(folder: Path) -> int:
    """Read every question, write it as text, and return how many there are."""
    shards = ShardFolder(folder)
    for key in list(shards.keys()):
        question = shards.question(*key)
        "".join(
            (
                *(turn.text for turn in question.earlier),
                *(question.id, question.text, question.answer, question.source),
                *question.choices,
            )
        ).encode()
        for reference in question.media:
            shards.media_bytes(reference)
    return len(shards)


@settings(deadline=None)
@given(lines=st.lists(LINES, max_size=6))
def test_lines(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source, health = Path(temporary) / "q.jsonl", SampleHealth(1.0)
        (source.parent / "a.png").write_bytes(b"picture")
        source.write_bytes(b"".join(line + b"\n" for line in [json.dumps(GOOD).encode(), *lines]))
        convert_jsonl(source, source.parent / "out", health=health)
        num_lines = 1 + sum(bool(line.strip()) for line in lines)
        assert health.num_good + health.num_bad == num_lines
        assert read_all(source.parent / "out") == health.num_good >= 1


def convert(source: Path, content: bytes) -> SampleHealth:
    """Convert a table; an error of the whole file is the only other end."""
    health = SampleHealth(1.0)
    (source.parent / "a.png").write_bytes(b"picture")
    source.write_bytes(content)
    try:
        convert_benchmark(source, source.parent / "out", health=health)
    except DataError as error:
        str(error).encode("utf-8", "backslashreplace")
        health = SampleHealth(1.0)
    else:
        assert read_all(source.parent / "out") == health.num_good
    return health


@settings(deadline=None)
@given(rows=st.lists(ROWS, max_size=5), as_lines=st.booleans())
def test_rows_of_json(rows: list[dict[str, Any]], as_lines: bool) -> None:
    rows = [GOOD, *rows]
    with tempfile.TemporaryDirectory() as temporary:
        if as_lines:
            health = convert(
                Path(temporary) / "t.jsonl",
                "".join(json.dumps(row) + "\n" for row in rows).encode(),
            )
        else:
            health = convert(Path(temporary) / "t.json", json.dumps(rows).encode())
        assert health.num_good + health.num_bad == len(rows)


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(TEXTS, min_size=2, max_size=4), max_size=5), raw=st.binary(max_size=40)
)
def test_rows_of_csv(rows: list[list[str]], raw: bytes) -> None:
    table = io.StringIO()
    csv.writer(table).writerows([["question", "answer", "image"], ["q", "1", ""], *rows])
    with tempfile.TemporaryDirectory() as temporary:
        health = convert(
            Path(temporary) / "t.csv", table.getvalue().encode("utf-8", "surrogatepass") + raw
        )
        assert health.num_good + health.num_bad >= 1

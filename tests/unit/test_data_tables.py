"""Tables as spreadsheets, data frames and hostile writers leave them."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data.errors import DataError
from tests.support.shard_samples import png
from tests.unit.test_data_benchmarks import convert


def test_tables_as_spreadsheets_write_them(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        "\ufeffquestion,answer,,\r\nq,1,,\r\n,,,\r\nr,2,,\r\n,,,\r\n".encode()
    )
    questions, _, conversion = convert(tmp_path / "t.csv")
    assert ([(each.text, each.answer) for each in questions], conversion.skipped) == (
        [("q", "1"), ("r", "2")],
        {},
    )


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (pyarrow.timestamp("ns"), 1_700_000_000_123_456_789),
        (pyarrow.timestamp("us"), 1 << 62),
        (pyarrow.timestamp("us", tz="Mars/Base"), 1),
        (pyarrow.duration("ns"), (1 << 62) + 1),
        (pyarrow.time64("ns"), 1),
        (pyarrow.date32(), (1 << 31) - 1),
    ],
)
def test_times_that_python_has_not_cost_no_row(
    tmp_path: Path, kind: pyarrow.DataType, number: int
) -> None:
    times = pyarrow.array([number, None], kind)
    table = {"question": ["q", "r"], "answer": ["1", "2"], "image": [png(), None], "made": times}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    questions, _, conversion = convert(tmp_path / "t.parquet")
    assert ([len(each.media) for each in questions], conversion.skipped) == ([1, 0], {})
    # Inside of an object beside a picture it is one counted row.
    inner = pyarrow.StructArray.from_arrays(
        [pyarrow.array([png(), None]), times], ["bytes", "made"]
    )
    parquet.write_table(pyarrow.table({**table, "image": inner}), tmp_path / "inner.parquet")
    assert convert(tmp_path / "inner.parquet")[2].skipped == {"bad_row": 1}


def test_an_object_without_values_is_no_picture(tmp_path: Path) -> None:
    nothing = {"bytes": None, "path": None}
    rows = [
        {"question": f"q{number}", "answer": "1", "image": value}
        for number, value in enumerate(({"bytes": png(), "path": "a"}, nothing))
    ]
    questions, _, conversion = convert(tmp_path / "t.parquet", rows)
    assert ([len(each.media) for each in questions], conversion.skipped) == ([1, 0], {})
    inner = {"question": "q", "answer": "1", "sample": {"picture": {"bytes": png(), "path": None}}}
    with pytest.raises(DataError, match="media in columns that are not read, got sample"):
        convert(tmp_path / "inner.parquet", [inner])


def test_options_that_nobody_can_write_down_are_one_bad_row(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "A", "choices": text}
        for text in (f"['a', 0x{'F' * 5000}]", "['a', 'b']")
    ]
    assert convert(tmp_path / "t.csv", rows)[2].skipped == {"bad_choice": 1}

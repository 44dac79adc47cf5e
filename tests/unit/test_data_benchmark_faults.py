"""Rows and tables of benchmarks that cannot be used: an error or a counted row."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError, SampleError
from data.imports.benchmarks import read_conversion
from data.imports.tables import read_rows
from data.media.opening import MediaLimits, MediaOpener
from tests.support.benchmark_tables import MMMU, convert
from tests.support.shard_samples import png


def test_what_is_wrong_with_a_row_is_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jsonl"
    good = {"question": "q", "answer": "1"}
    bad: list[tuple[Any, str, str]] = [
        ("{", "bad_json", "not valid JSON"),
        ([1], "bad_json", "not an object, got list"),
        (good | {"question": None}, "bad_field", "no question, got"),
        (good | {"id": "same"}, "", ""),
        (good | {"id": "same"}, "duplicate_id", "id is used twice"),
        (good | {"choices": ["x", "x"], "answer": "x"}, "bad_choice", "names no single option"),
        (
            good | {"choices": ["x", "y"], "answer": "C"},
            "bad_choice",
            "expected one of A, B or the text",
        ),
        (good | {"choices": "x or y"}, "bad_choice", "no list of options, got None"),
        (good | {"image": 7}, "bad_field", "no image, got int"),
        (
            good | {"image": {"bytes": None, "path": "a.png"}},
            "missing_media",
            "no file for the image 'a.png'",
        ),
        (
            good | {"image": "x" * 300 + ".png"},
            "missing_media",
            "cannot be read ([Errno 36] File name too long",
        ),
        (good | {"answer_type": "essay"}, "unknown_answer_type", "got 'essay'"),
    ]
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row, _, _ in bad)
    )
    questions, _, conversion = convert(path, format_name="fields")
    assert len(questions) == 1
    assert [(where, reason) for where, reason, _ in conversion.listed] == [
        (f"{path}:{number}", reason) for number, (_, reason, _) in enumerate(bad, start=1) if reason
    ]
    for (_, _, detail), (_, _, part) in zip(
        conversion.listed, (each for each in bad if each[1]), strict=True
    ):
        assert part in detail
    assert f"skipped sample {path}:1: bad_json" in caplog.text


def test_bytes_that_are_no_picture_are_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "1", "image": {"bytes": content}}
        for content in (b"GIF89a", png())
    ]
    questions, _, conversion = convert(tmp_path / "t.parquet", rows)
    assert (len(questions), conversion.skipped) == (1, {"unsupported_container": 1})


def test_media_can_be_opened_on_the_way(tmp_path: Path) -> None:
    opener = MediaOpener(MediaLimits(max_pixels=100))
    rows = [
        {"question": "q", "answer": "1", "image": {"bytes": png(*size)}}
        for size in ((8, 6), (20, 6))
    ]
    questions, _, conversion = convert(tmp_path / "t.parquet", rows, opener=opener)
    assert (len(questions), conversion.skipped) == (1, {"oversized": 1})


def test_rows_of_a_torn_csv_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('question,answer\nq,1\nq,1,2\nq\nq,2\n"open,3\n')
    rows = dict(read_rows(path))
    assert {
        number: str(row)[:40] for number, row in rows.items() if not isinstance(row, dict)
    }.keys() == {2, 3, 5}
    assert rows[4] == {"question": "q", "answer": "2"}


def test_errors_of_whole_files(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "1"}
    for name, content, message in [
        ("gone.json", None, r"gone\.json: no such file, expected a table"),
        ("t.xlsx", "x", r"unknown kind of table, got '\.xlsx', expected one of \.json"),
        ("t.json", "{", r"not valid JSON .* or name it \.jsonl"),
        ("u.json", '"x"', r"no rows, got str, expected a list of objects"),
        ("t.parquet", "x", r"not readable as Parquet"),
        (
            "t.csv",
            "a,b\n1,2\n",
            r"no column for question and answer, got columns a, b; name them: --fields "
            r"question=COLUMN, answer=COLUMN",
        ),
        (
            "empty.jsonl",
            "",
            r"no row can be used as fields, got {}, expected at least one; correct them: the file "
            r"has no rows",
        ),
    ]:
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=message):
            convert(path)
    with pytest.raises(
        DataError,
        match=r"unknown format, got 'mmlu', expected one of ai2d, .*, wemath, fields",
    ):
        convert(tmp_path / "a.json", [row], format_name="mmlu")
    with pytest.raises(
        DataError, match=r"unknown part of a question, got 'text', expected one of id, question"
    ):
        convert(tmp_path / "b.json", [row], fields={"text": "question"})
    with pytest.raises(
        DataError, match=r"(?s)too many bad samples, got 1 of 20 .*t2\.jsonl:1: no_answer"
    ):
        convert(tmp_path / "t2.jsonl", [row | {"answer": "?"}, *[row] * 19], max_bad_fraction=0.01)


def test_a_record_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    assert read_conversion(tmp_path) is None
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"conversion\.json: not readable .* convert the file again"
    ):
        read_conversion(tmp_path)


def test_pictures_that_no_part_is_read_from_are_never_left_out(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "1"}
    held = {"bytes": png(), "path": "a.png"}
    for number, row in enumerate(
        (
            {"images": [held]},
            {"images": [{"bytes": b"", "path": None}]},
            {"images": b""},
            {"anything": png()},
            {"anything": held},
            {"image_1": held},
            {"picture": "a.png"},
            {"video_path": "a.mp4"},
            {"file": "pictures/a.png"},
            {"imageUrl": "https://example.org/a"},
            {"photo": "data:image/png;base64,AAAA"},
            {"image": held, "images": [held]},
            {"image": held, "image_2": "b.png"},
        )
    ):
        with pytest.raises(DataError, match=r"unmapped_media|media in columns that are not read"):
            convert(tmp_path / f"{number}.parquet", [good | row])
    questions, _, conversion = convert(
        tmp_path / "ignored.parquet", [good | {"images": [held]}], fields={"ignore": "images"}
    )
    assert ([len(each.media) for each in questions], conversion.columns["ignore"]) == (
        [0],
        "images",
    )
    [question], _, _ = convert(
        tmp_path / "named.parquet", [good | {"images": [held, held]}], fields={"image": "images"}
    )
    assert [ref.extension for ref in question.media] == ["0.png", "1.png"]
    # Names and numbers beside a picture that is there.
    beside = {
        "image": held,
        "image_path": "a.png",
        "file_name": "a.png",
        "image_id": 7,
        "has_image": "yes",
        "image_url": "https://x",
    }
    [question], _, _ = convert(tmp_path / "beside.parquet", [good | beside])
    assert len(question.media) == 1


def test_empty_bytes_of_a_mapped_column_are_counted(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "1", "image": content} for content in (b"", png(), None)]
    questions, _, conversion = convert(tmp_path / "t.parquet", rows)
    assert [len(each.media) for each in questions] == [1, 0], (
        "nothing is no picture, an empty one is a lost one"
    )
    assert conversion.skipped == {"empty": 1}
    rows = [
        {"question": "q", "answer": "1", "image": [{"bytes": content}]} for content in (b"", png())
    ]
    assert convert(tmp_path / "lists.parquet", rows)[2].skipped == {"empty": 1}


def test_pictures_in_base64(tmp_path: Path) -> None:
    plain = base64.b64encode(png()).decode()
    rows = [
        {"question": "q", "answer": "1", "image": value}
        for value in (plain, f"data:image/png;base64,{plain}", "data:image/png;base64,AA")
    ]
    questions, folder, conversion = convert(tmp_path / "t.tsv", rows)
    assert [folder.media_bytes(each.media[0]) for each in questions] == [png(), png()]
    assert conversion.skipped == {"bad_field": 1}


def test_columns_and_parts_that_are_not_there_are_errors(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "1"}
    with pytest.raises(
        DataError,
        match=(
            r"no such column, got 'imgs' in --fields, expected one of answer, question; correct it"
        ),
    ):
        convert(tmp_path / "a.json", [row], fields={"image": "imgs"})
    with pytest.raises(DataError, match=r"mmmu has no such part, got 'video', expected one of"):
        convert(tmp_path / "b.parquet", [MMMU], fields={"video": "question"}, format_name="mmmu")
    rows = [*[row] * 30, row | {"later": "7"}]
    questions, _, _ = convert(tmp_path / "c.jsonl", rows, fields={"source": "later"})
    assert [each.source for each in questions][-2:] == ["c", "7"]
    inside = row | {"meta": {"picture": "a.png"}}
    with pytest.raises(DataError, match=r"no such column, got 'meta\.pictur' in --fields"):
        convert(tmp_path / "d.jsonl", [inside], fields={"image": "meta.pictur"})
    (tmp_path / "twice.csv").write_text("question,answer,image,image\nq,1,a.png,b.png\n")
    with pytest.raises(
        DataError, match=r"two columns have one name, got 'image', expected every name once"
    ):
        convert(tmp_path / "twice.csv")


def test_lines_that_an_open_quote_takes_along_are_all_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'question,answer\nq,1\n"open,2\nq,3\nq,4\nq,"5"x\ncaf\xe9,6\nq,7\n')
    rows = list(read_rows(path))
    reasons = [row.reason for _, row in rows if isinstance(row, SampleError)]
    assert reasons == ["bad_row"] * 4 + ["bad_text"]
    assert [row for _, row in rows if not isinstance(row, SampleError)] == [
        {"question": "q", "answer": "1"},
        {"question": "q", "answer": "7"},
    ]

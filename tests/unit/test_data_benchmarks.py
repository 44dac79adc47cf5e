"""Benchmark files as their authors publish them, made small: what comes out is a question that
reads like theirs.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data.errors import DataError, SampleError
from data.health import SampleHealth
from data.imports.benchmarks import Conversion, convert_benchmark, read_conversion
from data.imports.tables import read_rows
from data.media.opening import MediaLimits, MediaOpener
from data.question import Question
from data.shards import ShardFolder
from tests.support.shard_samples import png

Rows = Sequence[dict[str, Any]]

MATHVISTA: dict[str, Any] = {
    "pid": "1",
    "question": "How long is the bar?",
    "image": "images/1.jpg",
    "decoded_image": {"bytes": png(value=10), "path": "1.jpg"},
    "choices": None,
    "unit": "cm",
    "precision": 1.0,
    "answer": "1.2",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {"source": "Ruler", "split": "testmini"},
    "query": "Hint: …",
}
MMMU: dict[str, Any] = {
    "id": "validation_Art_7",
    "question": "Compare <image 2> with <image 4>.",
    "options": "['older', 'same as <image 4>', \"it's newer\"]",
    "answer": "C",
    "question_type": "multiple-choice",
    **{f"image_{number}": None for number in range(1, 8)},
    "image_2": {"bytes": png(value=2), "path": "2.png"},
    "image_4": {"bytes": png(value=4), "path": "4.png"},
}
VIDEOMME: dict[str, Any] = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "videoID": "aB-_9",
    "question_id": "001-1",
    "question": "What happens?",
    "options": ["A. A goal.", "B. A foul.", "C. Nothing.", "D. Rain."],
    "answer": "B",
}


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


def convert(
    path: Path, rows: Rows | None = None, max_bad_share: float = 1.0, **options: Any
) -> tuple[list[Question], ShardFolder, Conversion]:
    if rows is not None:
        write(path, rows)
    out = path.parent / f"{path.name}.shards"
    conversion = convert_benchmark(path, out, health=SampleHealth(max_bad_share), **options)
    assert read_conversion(out) == conversion
    folder = ShardFolder(out)
    return [folder.question(shard, key) for shard, key in list(folder.keys())], folder, conversion


def test_mathvista_with_pictures_inside(tmp_path: Path) -> None:
    rows = [
        MATHVISTA,
        MATHVISTA
        | {"pid": "2", "answer_type": "integer", "precision": None, "unit": None, "answer": "3"},
        MATHVISTA
        | {
            "pid": "3",
            "choices": ["B", "A"],
            "answer": "A",
            "question_type": "multi_choice",
            "answer_type": "text",
            "unit": None,
        },
        MATHVISTA
        | {"pid": "4", "answer_type": "text", "answer": "a bee", "unit": None, "precision": None},
        MATHVISTA | {"pid": "5", "answer": ""},
    ]
    questions, folder, conversion = convert(tmp_path / "testmini.parquet", rows)
    assert [
        (each.id, each.text, each.answer, each.answer_type, each.choices) for each in questions
    ] == [
        (
            "mathvista/1",
            "How long is the bar? (Unit: cm) Round the answer to 1 decimal place.",
            "1.2",
            "math",
            (),
        ),
        ("mathvista/2", "How long is the bar?", "3", "math", ()),
        # The answer is an option's text, although it looks like a letter.
        ("mathvista/3", "How long is the bar?", "B", "choice", ("B", "A")),
        ("mathvista/4", "How long is the bar?", "a bee", "open", ()),
    ]
    assert {each.source for each in questions} == {"mathvista/Ruler"}
    assert [ref.extension for ref in questions[0].media] == ["png"]  # by its bytes, not by its name
    assert folder.media_bytes(questions[0].media[0]) == png(value=10)
    assert (conversion.format, conversion.num_good, conversion.skipped) == (
        "mathvista",
        4,
        {"no_answer": 1},
    )
    assert conversion.listed[0][:2] == [f"{tmp_path / 'testmini.parquet'}:5", "no_answer"]


def test_mathvista_as_json_by_number_with_pictures_beside(tmp_path: Path) -> None:
    row = {key: value for key, value in MATHVISTA.items() if key not in ("decoded_image", "pid")}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(png(value=7))
    path = tmp_path / "testmini.json"
    path.write_text(
        json.dumps({"11": row | {"pid": "11"}, "12": row | {"pid": "12", "image": "images/2.jpg"}})
    )
    questions, folder, conversion = convert(path)
    assert [each.id for each in questions] == ["mathvista/11"]
    assert folder.media_bytes(questions[0].media[0]) == png(value=7)
    assert conversion.skipped == {"missing_media": 1}
    assert "no file for the image 'images/2.jpg'" in conversion.listed[0][2]


def test_mmmu_pictures_stand_first_and_markers_follow_them(tmp_path: Path) -> None:
    open_row = MMMU | {"options": "[]", "question_type": "open", "question": "How many?"}
    rows = [
        MMMU,
        open_row | {"id": "validation_Art_8", "answer": "['twenty', '$1,200.50', '1200.5']"},
        open_row | {"id": "validation_Art_9", "answer": "['Monet', 'Claude Monet']"},
        open_row | {"id": "validation_Art_10", "answer": "?"},
        MMMU | {"id": "validation_Art_11", "question": "See <image 1>."},
    ]
    questions, folder, conversion = convert(tmp_path / "art.parquet", rows)
    first = questions[0]
    assert (first.id, first.source, first.answer, first.answer_type) == (
        "mmmu/validation_Art_7",
        "mmmu/Art",
        "C",
        "choice",
    )
    assert first.text == "Compare <image 1> with <image 2>."
    assert first.choices == ("older", "same as <image 2>", "it's newer")
    assert [folder.media_bytes(ref) for ref in first.media] == [png(value=2), png(value=4)]
    assert [(each.answer, each.answer_type) for each in questions[1:]] == [
        ("$1,200.50", "math"),
        ("Monet or Claude Monet", "open"),
    ]
    assert conversion.skipped == {"no_answer": 1, "missing_media": 1}


def test_videomme_videos_lie_beside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "aB-_9.mp4").write_bytes(b"a film")
    rows = [VIDEOMME, VIDEOMME | {"question_id": "002-1", "videoID": "gone"}]
    questions, folder, conversion = convert(tmp_path / "test.parquet", rows)
    [question] = questions
    assert (question.id, question.source, question.answer) == (
        "videomme/001-1",
        "videomme/short",
        "B",
    )
    assert question.choices == ("A goal.", "A foul.", "Nothing.", "Rain.")
    assert [(ref.kind, ref.extension, folder.media_bytes(ref)) for ref in question.media] == [
        ("video", "mp4", b"a film")
    ]
    assert conversion.skipped == {"missing_media": 1}


def test_a_column_may_take_the_place_of_the_formats_own(tmp_path: Path) -> None:
    (tmp_path / "aB-_9.webm").write_bytes(b"a film")
    [question], _, conversion = convert(
        tmp_path / "test.json", [VIDEOMME], fields={"source": "domain"}
    )
    assert (question.source, question.media[0].extension) == ("videomme/Knowledge", "webm")
    assert conversion.columns["source"] == "domain"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_any_table_with_named_columns(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {
            "query": "Which?",
            "label": "two",
            "opts": '["one", "two"]',
            "img": "a.png",
            "from": "mine",
        },
        {"query": "How many?", "label": "2", "opts": "", "img": "", "from": "mine"},
    ]
    fields = {
        "question": "query",
        "answer": "label",
        "choices": "opts",
        "image": "img",
        "source": "from",
    }
    questions, _, conversion = convert(tmp_path / f"table.{suffix}", rows, fields=fields)
    assert [
        (
            each.id,
            each.text,
            each.answer,
            each.answer_type,
            each.choices,
            len(each.media),
            each.source,
        )
        for each in questions
    ] == [
        ("table/1", "Which?", "B", "choice", ("one", "two"), 1, "mine"),
        ("table/2", "How many?", "2", "math", (), 0, "mine"),
    ]
    assert conversion.format == "fields"


def test_dots_lists_and_a_constant_answer_type(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.mp4").write_bytes(b"film")
    row = {
        "q": {"text": "Why?"},
        "answer": 3,
        "one": "a.png",
        "two": ["a.png"],
        "media": ["a.png", "b.mp4"],
    }
    fields = {"question": "q.text", "image": "one, two", "answer_type": "open"}
    [question], _, _ = convert(tmp_path / "t.jsonl", [row], fields=fields)
    assert (question.text, question.answer, question.answer_type) == ("Why?", "3", "open")
    assert [ref.extension for ref in question.media] == ["0.png", "1.png", "2.png", "3.mp4"]


def test_rows_of_the_projects_own_lines_are_read_too(tmp_path: Path) -> None:
    rows = [{"id": "x", "question": "1 + 1?", "answer": "2", "answer_type": "math", "source": "s"}]
    [question], _, _ = convert(tmp_path / "own.jsonl", rows)
    assert question == Question(
        id="x", text="1 + 1?", media=(), answer="2", answer_type="math", source="s"
    )


def test_what_is_wrong_with_a_row_is_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jsonl"
    good = {"question": "q", "answer": "1"}
    bad: list[tuple[Any, str, str]] = [
        ("{", "bad_json", "no JSON"),
        ([1], "bad_json", "no object, got list"),
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
    assert [(place, reason) for place, reason, _ in conversion.listed] == [
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
        ("t.json", "{", r"no JSON .* or name it \.jsonl"),
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
        match=r"unknown format, got 'mmlu', expected one of mathvista, mmmu, videomme, fields",
    ):
        convert(tmp_path / "a.json", [row], format_name="mmlu")
    with pytest.raises(
        DataError, match=r"unknown part of a question, got 'text', expected one of id, question"
    ):
        convert(tmp_path / "b.json", [row], fields={"text": "question"})
    with pytest.raises(
        DataError, match=r"(?s)too many bad samples, got 1 of 20 .*t2\.jsonl:1: no_answer"
    ):
        convert(tmp_path / "t2.jsonl", [row | {"answer": "?"}, *[row] * 19], max_bad_share=0.01)


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
    (tmp_path / "twice.csv").write_text("question,answer,image,image\nq,1,a.png,b.png\n")
    with pytest.raises(
        DataError, match=r"two columns have one name, got 'image', expected every name once"
    ):
        convert(tmp_path / "twice.csv")


def test_options_keep_their_letters(tmp_path: Path) -> None:
    def one(name: str, row: dict[str, Any], **options: Any) -> Question | str:
        questions, _, conversion = convert(
            tmp_path / name, [row, {"question": "other", "answer": "1"}], **options
        )
        return questions[0] if len(questions) == 2 else conversion.listed[0][1]

    four = {"question": "q", "A": "x", "B": "y", "C": "z", "D": "", "answer": "C"}
    path = tmp_path / "columns.tsv"
    write(path, [four, four | {"B": "", "D": "w"}])
    questions, _, conversion = convert(path, fields={"choices": "A,B,C,D"})
    assert [(each.choices, each.answer) for each in questions] == [(("x", "y", "z"), "C")]
    assert conversion.skipped == {"bad_choice": 1}, "a gap would move the letters after it"
    for number, (choices, answer, expected) in enumerate(
        (
            ({"A": "x", "B": "y"}, "B", "B"),
            (["A. red", "B. blue"], "B. blue", "B"),
            (["A. red", "B. blue"], "B", "B"),
            (["red", "blue"], "(B) blue", "B"),
            (["red", "blue"], "B. red", "bad_choice"),
            (["B", "A"], "A", "bad_choice"),  # its letter or its text
            (["A", "B"], "A", "A"),
            (["x", None, "z"], "C", "bad_choice"),
            (["x", {"text": "y"}], "A", "bad_choice"),
            ([1, 2.5], "2.5", "B"),
        )
    ):
        found = one(f"{number}.json", {"question": "q", "choices": choices, "answer": answer})
        assert (found if isinstance(found, str) else found.answer) == expected, (choices, answer)


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

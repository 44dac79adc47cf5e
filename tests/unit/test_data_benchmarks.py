"""Benchmark files as their authors publish them, made small: the questions read like theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.question import Question
from tests.support.benchmark_tables import MATHVISTA, MMMU, VIDEOMME, convert, write_table
from tests.support.shard_samples import png


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


def test_a_named_column_replaces_the_formats_own(tmp_path: Path) -> None:
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
    row = {"id": "x", "question": "1 + 1?", "answer": "2", "answer_type": "math", "source": "s"}
    [question], _, _ = convert(tmp_path / "own.jsonl", [{**row, "metadata": {"box": [1, 2]}}])
    assert question == Question(
        id="x", text="1 + 1?", media=(), answer="2", answer_type="math", source="s",
        metadata='{"box": [1, 2]}',
    )  # fmt: skip


def test_options_keep_their_letters(tmp_path: Path) -> None:
    def one(name: str, row: dict[str, Any], **options: Any) -> Question | str:
        questions, _, conversion = convert(
            tmp_path / name, [row, {"question": "other", "answer": "1"}], **options
        )
        return questions[0] if len(questions) == 2 else conversion.listed[0][1]

    four = {"question": "q", "A": "x", "B": "y", "C": "z", "D": "", "answer": "C"}
    path = tmp_path / "columns.tsv"
    write_table(path, [four, four | {"B": "", "D": "w"}])
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

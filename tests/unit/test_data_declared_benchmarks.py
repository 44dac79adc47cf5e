"""Declared benchmarks: every one reads a row with the columns that public code names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data.errors import DataError
from data.imports.benchmark_formats import ANY_TABLE, DECLARED, known_formats, load_formats
from data.imports.benchmark_rows import SCORED_BY_FUNCTION, split_options
from data.imports.benchmarks import convert_benchmark
from data.question import ANSWER_TYPES
from data.shards import ShardFolder
from tests.support.benchmark_tables import convert, write_table
from tests.support.declared_rows import FILM, ROWS

SCORED = [*ANSWER_TYPES, *SCORED_BY_FUNCTION]


def test_the_suite_has_the_papers_number_of_benchmarks_by_family() -> None:
    formats = load_formats(DECLARED)
    families = Counter(known.family for known in formats.values())
    assert families == {"text": 10, "image": 16, "video": 5}
    assert formats.keys() == ROWS.keys()
    assert list(known_formats())[-1] == ANY_TABLE


@pytest.mark.parametrize("name", ROWS)
def test_a_row_with_the_published_columns_is_read(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    known = load_formats(DECLARED)[name]
    for below in ("", *known.folders[:1]):
        (tmp_path / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / (known.folders[0] if known.folders else "") / FILM).write_bytes(b"a film")
    path = tmp_path / "test.parquet"
    questions, _, conversion = convert(
        path, [row], format_name=name, answer_types=SCORED, media_root=tmp_path
    )
    assert conversion.skipped == {}, conversion.listed
    [question] = questions
    found = (question.text, question.answer, question.answer_type, question.choices)
    assert found == expected
    assert question.id.startswith(f"{name}/")
    assert question.source.startswith(f"{name}/")
    kinds = {ref.kind for ref in question.media}
    assert kinds == ({known.family} if known.family != "text" else set())


def test_all_right_answers_of_a_graded_question_reach_its_function(tmp_path: Path) -> None:
    questions, _, _ = convert(
        tmp_path / "t.parquet",
        [ROWS["infographicvqa"][0]],
        format_name="infographicvqa",
        answer_types=SCORED,
    )
    assert json.loads(questions[0].metadata) == {"answers": ["Ada", "Ada L."]}


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Which?\n(A) red\n(B) blue", "Which?", ["red", "blue"]),
        ("Which?\nChoices:\nA:1°\nB:2°\nC:3°", "Which?", ["1°", "2°", "3°"]),
        # Earlier letters in the text are no options.
        ("Is A. Smith taller? A. yes B. no", "Is A. Smith taller?", ["yes", "no"]),
        ("Angle (A) or (B)?\nA. first\nB. last", "Angle (A) or (B)?", ["first", "last"]),
        ("Find A. and C.", "Find A. and C.", []),
        ("No options", "No options", []),
        ("Which? A. red C. blue", "Which? A. red C. blue", []),
    ],
)
def test_options_at_the_end_of_a_text(text: str, question: str, options: list[str]) -> None:
    assert split_options(text) == (question, options)


def test_an_index_without_an_option_is_a_bad_choice(tmp_path: Path) -> None:
    row = ROWS["ai2d"][0]
    rows = [row, row | {"answer": "2"}, row | {"answer": "-1"}]
    _, _, conversion = convert(tmp_path / "t.parquet", rows, format_name="ai2d")
    assert (conversion.num_good, conversion.skipped) == (1, {"bad_choice": 2})
    assert "no option's index, got '2', expected 0 to 1" in conversion.listed[0][2]


def test_several_tables_are_one_benchmark(tmp_path: Path) -> None:
    row = ROWS["gsm8k"][0]
    files = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        files.append(write_table(tmp_path / str(number) / "test.parquet", [row, row]))
    convert_benchmark(tmp_path, tmp_path / "out", files=files, format_name="gsm8k")
    folder = ShardFolder(tmp_path / "out")
    ids = [folder.question(*each).id for each in list(folder.keys())]
    assert ids == [f"gsm8k/test/{number}" for number in range(1, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns: {question: q", r"not readable as YAML"),
        ("- a", r"declaration, got \['a'\], expected keys with values"),
        ("collumns: {}", r"key, got 'collumns', expected one of title, family"),
        ("columns: {question: q}", r"columns, got \['question'\], expected a column for answer"),
        ("columns: {text: q}", r"columns, got 'text', expected one of id, question"),
        ("columns: {question: 1}", r"columns, got {'question': 1}, expected Mapping\[str, str\]"),
        ("scoring: magic", r"scoring, got 'magic', expected one of \('rules'"),
        ("family: audio", r"family, got 'audio', expected one of \('text', 'image', 'video'\)"),
        ("shuffled: 1", r"shuffled, got 1, expected bool"),
        (
            "columns: {question: q, answer: a}\njudge: gone.txt",
            r"judge, got 'gone\.txt', expected a file beside it",
        ),
    ],
)
def test_a_wrong_declaration_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"(?s)mine\.yaml: {message}.*; correct it"):
        load_formats(tmp_path)


def test_a_folder_without_declarations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no benchmarks, got no \*\.yaml in it, expected one"):
        load_formats(tmp_path)

"""Table files as sources: the same questions, order and media as of shards, and exact resume."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data.errors import SampleError
from data.health import SampleHealth
from data.imports.tables import read_rows
from data.lint import lint
from data.media.opening import MediaLimits, MediaOpener
from data.media.store import MediaStore
from data.question import MediaRef, Question
from data.shards import ShardFolder
from data.sources.opening import open_source
from data.sources.parquet import ParquetTable
from data.sources.reader import SourceReader
from data.sources.rows import HELD
from data.sources.tables import TableSource
from data.stream import QuestionStream
from tests.support.shard_samples import png
from tests.support.source_files import (
    FORMS,
    make_shards,
    rows_of,
    write_form,
    write_lines,
    write_pictures,
)

NUM_ROWS = 23
COLUMNS = {form: {"image": "image,image_2"} for form in ("structs", "bytes")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardFolder | TableSource]:
    """The same questions in every form, and as shards."""
    folder = tmp_path_factory.mktemp("forms")
    rows = rows_of(write_pictures(folder, NUM_ROWS))
    opened: dict[str, ShardFolder | TableSource] = {
        form: open_source(write_form(form, folder, rows), columns=COLUMNS.get(form))
        for form in FORMS
    }
    return {**opened, "shards": open_source(make_shards(folder, rows))}


def questions(source: ShardFolder | TableSource) -> list[Question]:
    keys = source.keys()
    return [source.question(*key) for key in keys]


def without_places(question: Question) -> tuple[Question, list[str]]:
    return replace(question, media=()), [ref.kind for ref in question.media]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_questions_and_media_of_shards(
    sources: dict[str, ShardFolder | TableSource], form: str
) -> None:
    source, shards = sources[form], sources["shards"]
    assert len(source) == len(shards) == NUM_ROWS
    mine, theirs = questions(source), questions(shards)
    assert [*map(without_places, mine)] == [*map(without_places, theirs)]
    # Another process knows nothing but what a checkpoint keeps of the references.
    reader = SourceReader()
    for own, other in zip(mine, theirs, strict=True):
        kept = json.loads(json.dumps([asdict(ref) for ref in own.media]))
        references = [MediaRef(**ref) for ref in kept]
        contents = [shards.media_bytes(ref) for ref in other.media]
        assert [reader.media_bytes(ref) for ref in references] == contents
        assert [reader.media_size(ref) for ref in references] == [*map(len, contents)]


@pytest.mark.parametrize("form", FORMS)
def test_order_and_resume_are_those_of_shards(
    sources: dict[str, ShardFolder | TableSource], form: str
) -> None:
    def stream(source: ShardFolder | TableSource) -> QuestionStream:
        return QuestionStream([(source, 2.0), (sources["shards"], 1.0)], seed=3)

    whole = [question.id for question in stream(sources["shards"]).take(60)]
    first = stream(sources[form])
    assert [question.id for question in first.take(25)] == whole[:25]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = stream(sources[form])
    resumed.load_state_dict(state)
    assert [question.id for question in resumed.take(35)] == whole[25:]


def test_media_open_as_those_of_shards(sources: dict[str, ShardFolder | TableSource]) -> None:
    store = MediaStore(MediaLimits())
    keys = {form: list(source.keys()) for form, source in sources.items()}
    for index in (1, 4):  # an image and a clip
        expected = None
        for form, source in sources.items():
            question = source.question(*keys[form][index])
            frames = store.open(question.media[0]).pixels
            expected = frames if expected is None else expected
            assert frames.shape[0] == (4 if index == 4 else 1)
            assert (frames == expected).all(), form
    store.close()


def test_lint_finds_in_tables_what_it_finds_in_shards(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png()[:45])
    good = {"question": "1 + 1 = ?", "answer": "2"}
    lines = [
        {**good, "id": "a", "image": "cut.png"},
        {**good, "id": "a"},
        {**good, "image": "gone.png"},
        {**good, "answer": ""},
    ]
    source = open_source(write_lines(tmp_path / "q.jsonl", lines))
    count, problems = lint([source], MediaOpener(MediaLimits()))
    assert count == 4
    found = [(Path(problem.where).name, problem.reason) for problem in problems]
    assert found == [
        ("q.jsonl:1", "truncated"),
        ("q.jsonl:2", "duplicate_id"),
        ("q.jsonl:3", "missing"),
        ("q.jsonl:4", "bad_field"),
    ]


def test_columns_are_named_and_values_become_text(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    schema = pyarrow.schema(
        [
            ("prompt", pyarrow.string()),
            ("label", pyarrow.int64()),
            ("meta", pyarrow.struct([("set", pyarrow.string()), ("number", pyarrow.int64())])),
            ("picture", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("thumbnail", pyarrow.binary()),
            ("time", pyarrow.timestamp("ns")),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    row = {
        "prompt": "What is it?",
        "label": 1,
        "meta": {"set": "pets", "number": 7},
        "picture": {"bytes": None, "path": "pictures/1.png"},
        "thumbnail": b"x",
        "time": 1,
    }
    parquet.write_table(pyarrow.Table.from_pylist([row], schema), tmp_path / "pets.parquet")
    columns = {
        "question": "prompt", "answer": "label", "id": "meta.number", "source": "meta.set",
        "image": "picture", "ignore": "thumbnail",
    }  # fmt: skip
    source = open_source(tmp_path / "pets.parquet", columns=columns, answer_type="open")
    question = source.question(*source.keys()[0])
    image = MediaRef("image", f"{tmp_path}/", "pictures/1", "png")
    assert question == Question("7", "What is it?", (image,), "dog", "open", (), "pets")
    assert source.media_bytes(image) == png(32, 32, 2)
    bare = open_source(
        tmp_path / "pets.parquet",
        columns={**columns, "id": "", "source": "", "ignore": "thumbnail"},
    )
    assert bare.question(*bare.keys()[0]).id == "pets/1"
    assert bare.question(*bare.keys()[0]).answer_type == "math"
    assert bare.fingerprint() != source.fingerprint()


def test_a_column_is_shown_once_whatever_part_it_is_named_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"question": "1?", "answer": "1", "images": ["a.png"], "media": {"path": "a.png"}}]
    path = write_lines(tmp_path / "q.jsonl", rows)
    for columns in (
        {"image": "images", "ignore": "media"},
        {"image": "media.path", "ignore": "images"},
    ):
        source = open_source(path, columns=columns)
        assert len(source.question(*source.keys()[0]).media) == 1


def test_values_of_tables_are_plain_texts_and_json(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    schema = pyarrow.schema(
        [
            ("question", pyarrow.string()),
            ("answer", pyarrow.float32()),
            ("label", pyarrow.int64()),
            ("metadata", pyarrow.struct([
                ("time", pyarrow.timestamp("us")),
                ("price", pyarrow.decimal128(6, 2)),
            ])),
            ("raw", pyarrow.binary()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )  # fmt: skip
    when = datetime(2024, 5, 6, 7, 8, 9)
    row = {
        "question": "?", "answer": 0.1, "label": -1, "raw": b"x",
        "metadata": {"time": when, "price": Decimal("12.50")},
    }  # fmt: skip
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row], schema), path)
    source = open_source(path, columns={"ignore": "raw"})
    question = source.question(*source.keys()[0])
    assert question.answer == "0.1"
    assert json.loads(question.metadata) == {"time": when.isoformat(), "price": 12.5}
    (_, converted), *_ = read_rows(path)
    assert not isinstance(converted, SampleError)
    assert (converted["answer"], converted["label"]) == (0.1, None)
    for columns, message in (
        ({"answer": "label", "ignore": "raw"}, "field answer is wrong, got None"),
        ({"metadata": "raw"}, r"q\.parquet:1: field metadata is no JSON value, got bytes, exp"),
    ):
        source = open_source(path, columns=columns)
        with pytest.raises(SampleError, match=message):
            source.question(*source.keys()[0])


def test_questions_are_read_without_the_bytes_of_their_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    rows = rows_of(write_pictures(folder, 9))
    rows = [row for row in rows if len(row["media"]) == 1 and row["media"][0].endswith("png")]
    path = min((write_form("structs", folder, rows) / "data").glob("*.parquet"))
    table = ParquetTable(path)
    row = table.row(0, frozenset({"video", "image_2"}))
    assert row["image"] == {"path": "1.png", "bytes": HELD}
    group, inline = table._questions(0, frozenset({"video", "image_2"}))
    assert inline == {"image"}
    assert "bytes" not in str(group.schema.field("image").type)


def test_a_bad_row_is_replaced_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"{index}?", "answer": str(index)} for index in range(20)
    ]
    rows[3]["question"] = "How many dogs are in <image>?"
    rows[4]["scan"] = "data:image/png;base64,AAAA"
    source = open_source(write_lines(tmp_path / "q.jsonl", rows))
    health = SampleHealth(max_bad_fraction=0.5)
    stream = QuestionStream([(source, 1.0)], 1, health)
    assert len({question.id for question in stream.take(18)}) == 18
    stream.take(2)
    assert health.counts == {"missing_media": 1, "unmapped_media": 1}
    assert [entry[0] for entry in sorted(health.listed)] == [
        f"{tmp_path}/q.jsonl:4", f"{tmp_path}/q.jsonl:5",
    ]  # fmt: skip
    assert "got scan, expected a part of the question; name them: columns: {image: scan}" in str(
        health.listed
    )


def test_a_row_has_metadata_and_an_answer_type_of_a_reward_function(tmp_path: Path) -> None:
    row = {"question": "Where?", "answer": "[1, 2]", "size": {"width": 9}}
    path = write_lines(tmp_path / "q.jsonl", [row])
    source = open_source(
        path, columns={"metadata": "size"}, answer_type="box", answer_types=("math", "box")
    )
    question = source.question(*source.keys()[0])
    assert (question.answer_type, question.metadata) == ("box", '{"width": 9}')
    plain = open_source(path, answer_type="box")
    with pytest.raises(SampleError, match="unknown answer_type, got 'box'"):
        plain.question(*plain.keys()[0])

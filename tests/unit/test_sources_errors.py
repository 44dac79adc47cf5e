"""Table files that cannot be used, and paths that name no source, each with its message."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from data.errors import DataError, MediaError, SampleError
from data.health import SampleHealth
from data.media.opening import MediaLimits, MediaOpener
from data.sources.opening import open_source
from data.sources.reader import SourceReader
from data.sources.tables import check_default_ids
from tests.support.shard_samples import png
from tests.support.source_files import rows_of, write_form, write_lines
from zppo_mm.config.load import load_config
from zppo_mm.run.questions import build_stream

GOOD = {"question": "1 + 1 = ?", "answer": "2"}


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def compressed_arrow(folder: Path) -> Path:
    table = pyarrow.Table.from_pylist([{**GOOD, "image": b"\0" * 100_000}])
    options = ipc.IpcWriteOptions(compression="lz4")
    with ipc.new_stream(folder / "q.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    return folder / "q.arrow"


def splits(folder: Path) -> Path:
    (folder / "data").mkdir()
    for name in ("train", "test"):
        write_parquet(folder / "data" / f"{name}-00000-of-00001.parquet", [GOOD])
    return folder


def saved_splits(folder: Path) -> Path:
    for name in ("train", "test"):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


def wrong_state(folder: Path) -> Path:
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    return folder


def two_kinds(folder: Path) -> Path:
    write_lines(folder / "a.jsonl", [GOOD])
    write_parquet(folder / "a.parquet", [GOOD])
    return folder


def part_of_a_split(folder: Path) -> Path:
    write_lines(folder / "questions.jsonl", [GOOD])
    write_lines(folder / "test.jsonl", [GOOD])
    return folder


def file(name: str, content: bytes = b"x") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def lines(*rows: Mapping[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: write_lines(folder / "q.jsonl", rows)


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "list": (file("q.json"), {}, r"one by one, got \.json.*make_shards\.py benchmark \S+q\.json"),
    "csv": (file("q.csv"), {}, r"one by one, got \.csv.*make_shards\.py benchmark"),
    "compressed lines": (file("q.jsonl.gz"), {}, r"unknown kind of source, got '\.gz'.*unpack it"),
    "one shard": (file("a.tar"), {}, r"one shard, got a file, expected the folder"),
    "empty lines": (file("q.jsonl", b"\n \n"), {}, "no lines, got an empty file"),
    "no parquet": (file("q.parquet", b"PAR1" + b"\0" * 40), {}, "not readable as Parquet"),
    "no arrow": (file("q.arrow", b"ARROW1" * 9), {}, "not readable as Arrow"),
    "compressed arrow": (compressed_arrow, {}, r"compressed.*make_shards\.py \S+q\.arrow FOLDER"),
    "splits": (splits, {}, r"several splits, got test, train.*such as \S+/data/test\*\.parquet"),
    "saved splits": (saved_splits, {}, r"several splits, got test, train.*such as \S+/test"),
    "one split": (
        part_of_a_split, {},
        r"with and without a split in their name, got test\.jsonl and questions\.jsonl, ex",
    ),
    "state": (wrong_state, {}, r"no files of its own, got \['\.\./x\.arrow'\]"),
    "kinds": (two_kinds, {}, r"several kinds, got \.jsonl, \.parquet"),
    "nothing": (lambda folder: folder / "gone.jsonl", {}, "no shards, got no folder"),
    "pattern": (lambda folder: folder / "*.jsonl", {}, "no file fits this pattern"),
    "shards": (lambda folder: folder, {"answer_type": "math"}, "no table files, got columns, answ"),
    "part": (lines(GOOD), {"columns": {"prompt": "x"}}, "unknown part of a question, got 'prompt'"),
    "column": (lines(GOOD), {"columns": {"image": "scan"}}, "no such column, got 'scan' in"),
    "path in an object": (
        lines({**GOOD, "meta": {"picture": "a.png"}}), {"columns": {"image": "meta.pictur"}},
        r"no such column, got 'meta\.pictur' in columns, expected one of .*meta\.picture",
    ),
    "path in a struct": (
        lambda folder: write_parquet(folder / "q.parquet", [{**GOOD, "meta": {"picture": "a"}}]),
        {"columns": {"image": "meta.pictur"}}, r"no such column, got 'meta\.pictur' in",
    ),
    "column twice": (
        lines(GOOD), {"columns": {"image": "a,b", "video": "b"}},
        "a column of media is named twice, got 'b', expected it under one of",
    ),
    "question": (
        lines({"prompt": "1 + 1 = ?", "solution": "2"}), {},
        r"no column for question and answer, got columns prompt, solution; name them: columns: "
        r"\{question: COLUMN, answer: COLUMN\}",
    ),
    "unread pictures": (
        lambda folder: write_parquet(folder / "q.parquet", [{**GOOD, "scan": b"x"}]), {},
        r"q\.parquet:1: media in columns that are not read, got scan.*columns: \{image: scan\}",
    ),
    "unread pictures in an object": (
        lambda folder: write_parquet(
            folder / "q.parquet", [{**GOOD, "meta": {"set": "s", "picture": b"x"}}]
        ), {"columns": {"source": "meta.set"}},
        r"q\.parquet:1: media in columns that are not read, got meta\.picture,",
    ),
    "unread list of pictures": (
        lambda folder: write_parquet(
            folder / "q.parquet", [{**GOOD, "shots": [{"bytes": b"x", "path": "a"}]}]
        ), {},
        r"q\.parquet:1: media in columns that are not read, got shots",
    ),
    "row groups": (
        lambda folder: write_parquet(folder / "q.parquet", [
            {**GOOD, "image": bytes([index]) * 3000} for index in range(9)
        ]), {}, r"row groups are too large.*at most 20000.*make_shards\.py \S+q\.parquet F",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_sources_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("data.sources.parquet.MAX_GROUP_BYTES", 20_000)
    make, options, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        open_source(make(tmp_path), **options)


BAD_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "number": ({"image": 3}, "bad_field", "column image holds no medium, got int"),
    "address": ({"image": "https://x/a.png"}, "bad_field", "column image has an address, got http"),
    "ending": ({"media": ["a.tiff"]}, "unknown_media", "unknown kind of media, got 'a.tiff'"),
    "many": ({"images": ["a.png"] * 1001}, "bad_field", "too many media files, got 1001"),
    "marker": ({"question": "<image> and <image>"}, "missing_media", "got 2 times <image> and 0"),
    "unread": ({"screenshot": "a.png"}, "unmapped_media", "got screenshot, expected a part of the"),
    "unread inside": (
        {"meta": {"set": "s", "picture": "a.png"}}, "unmapped_media", r"got meta\.picture, expec",
    ),
    "answer": ({"answer": True}, "bad_field", "field answer is wrong, got True"),
    "half a pair": ({"extra": "\ud83d"}, "bad_text", "invalid text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_say_what_is_wrong_and_where(tmp_path: Path, case: str) -> None:
    fields, reason, message = BAD_ROWS[case]
    columns = {"source": "meta.set"} if "meta" in fields else None
    path = write_lines(tmp_path / "q.jsonl", [{**GOOD, "meta": {"set": "s"}}, {**GOOD, **fields}])
    source = open_source(path, columns=columns)
    with pytest.raises(SampleError, match=rf"q\.jsonl:2: .*{message}") as caught:
        source.question(*source.keys()[1])
    assert caught.value.reason == reason


def test_names_of_shown_media_may_be_repeated_in_an_object(tmp_path: Path) -> None:
    meta = {"set": "s", "image": "one.png", "pages": 3}
    path = write_lines(tmp_path / "q.jsonl", [{**GOOD, "image": "one.png", "meta": meta}])
    for columns in (None, {"source": "meta.set"}):
        source = open_source(path, columns=columns)
        assert len(source.question(*source.keys()[0]).media) == 1


def test_a_run_refuses_sources_with_the_same_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", [GOOD])
    listed = ",".join(f"{{path: {tmp_path}/{name}/train.jsonl}}" for name in ("a", "b"))
    config = load_config(None, [f"data.train=[{listed}]"])
    with pytest.raises(DataError, match="its rows have no id and would get those of"):
        build_stream(config, SampleHealth())


def test_two_columns_of_one_part_are_one_value_or_an_error(tmp_path: Path) -> None:
    rows = [{**GOOD, "b": None}, {**GOOD, "b": "3"}]
    source = open_source(write_lines(tmp_path / "q.jsonl", rows), columns={"answer": "answer,b"})
    assert source.question(*source.keys()[0]).answer == "2"
    with pytest.raises(SampleError, match="two values for answer, got columns answer, b"):
        source.question(*source.keys()[1])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../secret.png", "path leaves the media root"),
        ("gone.png", r"gone\.png cannot be read \(No such file"),
        ("folder.png", "is not a regular file, got a directory"),
        ("empty.png", "the file is empty"),
    ],
)
def test_media_paths_stay_in_their_folder(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "in"
    (folder / "folder.png").mkdir(parents=True)
    (folder / "empty.png").write_bytes(b"")
    source = open_source(write_lines(folder / "q.jsonl", [{**GOOD, "image": path}]))
    question = source.question(*source.keys()[0])
    with pytest.raises(MediaError, match=message):
        MediaOpener(MediaLimits()).read_ref(question.media[0], SourceReader())


def test_media_paths_start_from_the_root_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "one.png").write_bytes(png())
    path = write_lines(tmp_path / "in" / "q.jsonl", [{**GOOD, "image": "one.png"}])
    source = open_source(path, media_root=tmp_path)
    assert source.media_bytes(source.question(*source.keys()[0]).media[0]) == png()


@pytest.mark.parametrize("form", ["paths", "structs"])
def test_a_file_that_was_changed_is_no_longer_read(tmp_path: Path, form: str) -> None:
    columns = {"image": "image,image_2"} if form == "structs" else None
    path = write_form(form, tmp_path, rows_of([[]] * 8))
    source = open_source(path, columns=columns)
    for file in [path] if form == "paths" else (path / "data").iterdir():
        file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"the file was changed, got \d+ bytes, expected \d+"):
        source.question(*source.keys()[0])


def test_an_arrow_file_that_was_replaced_is_no_longer_read(tmp_path: Path) -> None:
    path = write_form("stream", tmp_path, rows_of([[]] * 8))
    source = open_source(path, columns={"image": "images", "video": "videos"})
    first = source.keys()[0]
    assert source.question(*first).id == "q0"
    other = tmp_path / "other.arrow"
    other.write_bytes(path.read_bytes())
    other.replace(path)
    with pytest.raises(DataError, match=r"stream\.arrow: the file was changed or replaced"):
        source.question(*first)


def test_dictionaries_are_no_sign_of_compression(tmp_path: Path) -> None:
    """Every batch refers to the one dictionary of the file."""
    names = pyarrow.array([f"{number:0200}" for number in range(50)] * 4).dictionary_encode()
    texts = pyarrow.array(["1 + 1 = ?"] * 200)
    table = pyarrow.table({"question": texts, "answer": names})
    with ipc.new_file(tmp_path / "q.arrow", table.schema) as writer:
        writer.write_table(table, 5)
    source = open_source(tmp_path / "q.arrow")
    assert source.question(*source.keys()[57]).answer == f"{7:0200}"


def test_rows_of_two_sources_do_not_get_the_same_ids(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{**GOOD, "number": f"{name}{number}"} for number in range(2)]
        paths.append(write_lines(tmp_path / name / "train.jsonl", rows))
    message = (
        r"b/train\.jsonl: its rows have no id and would get those of \S+a/train\.jsonl, got 't"
    )
    with pytest.raises(DataError, match=message):
        check_default_ids([open_source(path) for path in paths])
    check_default_ids([open_source(paths[0]), open_source(paths[0])])  # the same questions twice
    check_default_ids([open_source(path.parent) for path in paths])
    check_default_ids([open_source(path, columns={"id": "number"}) for path in paths])


def test_another_content_or_reading_has_another_fingerprint(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", [GOOD])
    prints = [open_source(path).fingerprint(), open_source(path, answer_type="open").fingerprint()]
    prints.append(open_source(path, media_root=tmp_path).fingerprint())
    path.write_text(path.read_text().replace("2", "3"))
    prints.append(open_source(path).fingerprint())
    table = write_parquet(tmp_path / "q.parquet", [GOOD])
    prints.append(open_source(table).fingerprint())
    write_parquet(table, [{**GOOD, "answer": "4"}])
    prints.append(open_source(table).fingerprint())
    assert len(set(prints)) == 6


def test_cut_files_are_errors_of_the_user(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", [GOOD] * 50).read_bytes()
    for size in range(0, len(whole), 37):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.parquet: not readable as Parquet"):
            open_source(tmp_path / "cut.parquet")


def test_damaged_pages_are_errors_of_the_user(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "q.parquet", [GOOD] * 50)
    content = bytearray(path.read_bytes())
    for start in range(4, 200, 7):
        damaged = content[:start] + b"\xff\xff\xff" + content[start + 3 :]
        path.write_bytes(damaged)
        try:
            source = open_source(path)
            source.question(*source.keys()[20])
        except DataError:
            continue


def test_lines_that_are_no_json_are_counted_rows(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{{broken\n[1]\n{json.dumps(GOOD)}")
    source = open_source(path)
    assert [key for _, key in source.keys()] == ["1", "3", "4", "5"]  # noqa: SIM118
    for index, reason in ((1, "bad_json"), (2, "bad_json")):
        with pytest.raises(SampleError) as caught:
            source.question(*source.keys()[index])
        assert caught.value.reason == reason
    assert source.question(*source.keys()[3]).id == "q/5"

"""Damaged shards: an error, a bad sample, or exactly what they hold; never fewer samples in
silence.
"""

from __future__ import annotations

import json
import logging
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import DataError, SampleError
from data.lint import lint
from data.question import MediaRef, Question
from data.sample import parse_question
from data.shards import ShardReader
from data.tar_index import scan_tar, sidecar_path
from data.text import is_valid_text
from tests.fuzz.damaged_shards import (
    Content,
    Original,
    Step,
    by_tarfile,
    damaged,
    foreign,
    ours,
    read_all,
    steps,
)
from tests.support.shard_samples import QUESTION


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    logging.disable(logging.WARNING)  # thousands of damaged indexes are named there
    yield tmp_path_factory.mktemp("fuzz")
    logging.disable(logging.NOTSET)


def build_ours() -> tuple[Original, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        return ours(Path(temporary)), next(Path(temporary).glob("*.idx.json")).read_bytes()


OURS, INDEX = build_ours()
FOREIGN = [
    foreign(tar_format)
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
]
TRUTH = [
    (
        key,
        json.loads(dict(files)["json"])["answer"],
        [content for extension, content in files if extension != "json"],
    )
    for key, files in OURS.content
]


def read_files(shard: Path) -> Content | DataError:
    """Return every file of a shard through its reader, or why that is not possible."""
    reader = ShardReader()
    try:
        samples = reader.index(str(shard)).samples
        return [
            (
                key,
                [
                    (each.extension, reader.media_bytes(ref(shard, key, each.extension)))
                    for each in files
                ],
            )
            for key, files in samples.items()
        ]
    except DataError as error:
        return error
    finally:
        reader.close()


def fields_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.text(max_size=4), values, max_size=4)


def ref(shard: Path, key: str, extension: str) -> MediaRef:
    return MediaRef("image", str(shard), key, extension)


@settings(deadline=None)
@given(several=steps(OURS))
def test_beside_its_index_a_damaged_shard_is_an_error_or_the_truth(
    folder: Path, several: list[Step]
) -> None:
    path = folder / "a.tar"
    path.write_bytes(damaged(OURS.shard, several))
    sidecar_path(path).write_bytes(INDEX)
    found = read_all(folder)
    if isinstance(found, DataError):
        assert str(path) in str(found)
        return
    assert [key for key, _, _ in found] == [key for key, _, _ in TRUTH]
    for (_, question, media), (_, answer, files) in zip(found, TRUTH, strict=True):
        assert isinstance(question, DataError) or question.answer == answer
        assert isinstance(question, DataError) or isinstance(media, DataError) or media == files
    if any(isinstance(question, DataError) for _, question, _ in found):
        assert lint([folder])[1] != []


@settings(deadline=None)
@given(which=st.sampled_from(range(4)), data=st.data())
def test_without_an_index_a_damaged_shard_is_an_error_or_what_tarfile_reads(
    folder: Path, which: int, data: st.DataObject
) -> None:
    whole = (OURS, *FOREIGN)[which]
    shard = damaged(whole.shard, data.draw(steps(whole)))
    path = folder / "a.tar"
    path.write_bytes(shard)
    sidecar_path(path).unlink(missing_ok=True)
    content = read_files(path)
    if isinstance(content, DataError):
        assert str(path) in str(content)
    else:
        assert content == by_tarfile(shard)


@settings(deadline=None)
@given(
    which=st.sampled_from(range(4)),
    fraction=st.floats(0, 1, exclude_max=True),
    to_block=st.booleans(),
)
def test_a_shard_cut_off_anywhere_is_an_error_or_the_truth(
    folder: Path, which: int, fraction: float, to_block: bool
) -> None:
    whole = (OURS, *FOREIGN)[which]
    size = int(fraction * len(whole.shard))
    path = folder / "a.tar"
    path.write_bytes(whole.shard[: size // 512 * 512 if to_block else size])
    sidecar_path(path).unlink(missing_ok=True)
    content = read_files(path)
    # It is whole where the cut only took some of the zeros that fill up the last record.
    assert isinstance(content, DataError) or content == whole.content


@settings(deadline=None)
@given(shard=st.binary(max_size=4096))
def test_any_bytes_are_an_error(folder: Path, shard: bytes) -> None:
    path = folder / "a.tar"
    path.write_bytes(shard)
    with pytest.raises(DataError):
        scan_tar(path)


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),
)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | fields_of(inner), max_leaves=8
)
NAMES = st.sampled_from(
    ["id", "question", "answer", "answer_type", "choices", "media", "source", "other"]
)
WORDS = st.sampled_from(
    ["math", "choice", "open", "A", "png", "0.png", "\ud800", "\0", ["A", "B"], ["png"], [["png"]]]
)


@settings(deadline=None)
@given(changes=st.dictionaries(NAMES, st.one_of(JSON, WORDS), max_size=4), ascii_only=st.booleans())
@example(changes={"question": "\ud83d"}, ascii_only=True)
def test_any_fields_are_a_question_or_one_bad_sample(
    changes: dict[str, Any], ascii_only: bool
) -> None:
    fields = {**json.loads(QUESTION), **changes}
    content = json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        question = parse_question("s.tar", "k", content, ("json", "png", "0.png"))
    except SampleError as error:
        message = str(error)
    else:
        message = ""
        check_question(question, fields)
    assert is_valid_text(message)
    assert len(message) < 1000


def check_question(question: Question, fields: dict[str, Any]) -> None:
    kept = (question.id, question.text, question.answer, question.source, *question.choices)
    assert (question.id, question.text, question.answer) == tuple(
        fields[name] for name in ("id", "question", "answer")
    )
    assert all(is_valid_text(text) for text in kept)


@settings(deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_question_are_one_bad_sample(content: bytes) -> None:
    with pytest.raises(SampleError):
        parse_question("s.tar", "k", content, ("json",))

"""Sources behind addresses: the same questions, order, media and resume as of the same files here,
fetched once; what cannot be fetched, or was changed, is named.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest

from data.errors import DataError, SampleError
from data.lint import lint
from data.media.opening import MediaLimits, MediaOpener
from data.media.store import MediaStore
from data.question import MediaRef, Question
from data.remote_files import RemoteFiles, is_address
from data.shards import ShardFolder
from data.sources.opening import open_source
from data.sources.reader import SourceReader, TableFiles
from data.sources.tables import TableSource
from data.stream import QuestionStream
from tests.support.file_server import FileServer, serve_files
from tests.support.running import free_port
from tests.support.source_files import (
    FORMS,
    make_shards,
    rows_of,
    write_form,
    write_lines,
    write_pictures,
)

GENEROUS = 1 << 30
NUM_ROWS = 12
COLUMNS = {form: {"image": "image,image_2"} for form in ("structs", "bytes")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions in every form, and as shards."""
    folder = tmp_path_factory.mktemp("served")
    rows = rows_of(write_pictures(folder, NUM_ROWS))
    for form in FORMS:
        write_form(form, folder, rows)
    make_shards(folder, rows)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serve_files(folder) as made:
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[Path, FileServer]]:
    """A folder that a test may change, and its server."""
    served = tmp_path / "own"
    make_shards(served, rows_of(write_pictures(served, NUM_ROWS)))
    with serve_files(served) as made:
        yield served, made


def path_of(form: str) -> str:
    files = {"paths": "questions.jsonl", "data_urls": "urls.jsonl", "stream": "stream.arrow"}
    return files.get(form, form)


def remote(tmp_path: Path, max_bytes: int = GENEROUS) -> RemoteFiles:
    return RemoteFiles(tmp_path / "cache", max_bytes, num_attempts=3, backoff_seconds=0.0)


def questions(source: ShardFolder | TableSource) -> list[Question]:
    return [source.question(*key) for key in source.keys()]  # noqa: SIM118


@pytest.mark.parametrize("form", [*FORMS, "shards"])
def test_a_remote_source_is_the_local_one(
    folder: Path, server: FileServer, tmp_path: Path, form: str
) -> None:
    files, columns = remote(tmp_path), COLUMNS.get(form)
    source = open_source(f"{server.url}/{path_of(form)}", columns=columns, files=files)
    local = open_source(folder / path_of(form), columns=columns)
    assert source.fingerprint() == local.fingerprint()
    mine, theirs = questions(source), questions(local)
    assert [question.id for question in mine] == [question.id for question in theirs]
    # Another process knows nothing but what a checkpoint keeps of the references.
    reader = SourceReader(TableFiles(pickle.loads(pickle.dumps(files))))
    for own, other in zip(mine, theirs, strict=True):
        kept = json.loads(json.dumps([asdict(ref) for ref in own.media]))
        contents = [local.media_bytes(ref) for ref in other.media]
        assert [reader.media_bytes(MediaRef(**ref)) for ref in kept] == contents
        assert [reader.media_size(MediaRef(**ref)) for ref in kept] == [*map(len, contents)]
        assert [source.media_bytes(ref) for ref in own.media] == contents
    assert set(server.gets.values()) == {1}, "once for all who read"


def test_shards_are_fetched_when_they_are_read_and_resume_is_exact(
    folder: Path, server: FileServer, tmp_path: Path
) -> None:
    local = QuestionStream([(open_source(folder / "shards"), 1.0)], seed=3)
    whole = [question.id for question in local.take(30)]
    files = remote(tmp_path)
    stream = QuestionStream([(open_source(f"{server.url}/shards", files=files), 1.0)], seed=3)
    assert not [name for name in server.gets if name.endswith(".tar")], "the indexes are enough"
    assert [question.id for question in stream.take(11)] == whole[:11]
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = QuestionStream([(open_source(f"{server.url}/shards", files=files), 1.0)], seed=3)
    resumed.load_state_dict(state)
    assert [question.id for question in resumed.take(19)] == whole[11:]
    assert {name: count for name, count in server.gets.items() if count > 1} == {}
    sizes = [path.stat().st_size for path in (folder / "shards").iterdir()]
    assert files.counts["fetched"] == len(sizes)
    assert files.counts["fetched_bytes"] == sum(sizes)


def test_a_small_cache_holds_its_limit_and_gives_the_same(
    folder: Path, server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = sorted(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
    indexes = sum(path.stat().st_size for path in (folder / "shards").glob("*.json"))
    limit = sizes[-1] + indexes
    files = remote(tmp_path, limit)
    with caplog.at_level(logging.WARNING):
        source = open_source(f"{server.url}/shards", files=files)
    assert (
        f"its shards have {sum(sizes)} bytes, the cache remote.cache_bytes={limit}" in caplog.text
    )
    local = open_source(folder / "shards")
    for mine, theirs in zip(questions(source), questions(local), strict=True):
        assert mine.id == theirs.id
        for ref, other in zip(mine.media, theirs.media, strict=True):
            assert source.media_bytes(ref) == local.media_bytes(other)
        kept = [path for path in (tmp_path / "cache").rglob("shard-*") if path.is_file()]
        assert sum(path.stat().st_size for path in kept) <= limit
    assert files.counts["evicted"] >= len(sizes) - 1
    with pytest.raises(DataError, match=r"larger than the cache, got .*remote\.cache_bytes=100"):
        open_source(f"{server.url}/shards", files=remote(tmp_path, 100))


def test_a_shard_that_is_held_open_makes_way_for_others(
    folder: Path, server: FileServer, tmp_path: Path
) -> None:
    files = remote(tmp_path)
    source = open_source(f"{server.url}/shards", files=files)
    whole = questions(source)
    shards = list((tmp_path / "cache").rglob("*.tar"))
    for path in shards:
        assert RemoteFiles(tmp_path / "cache", GENEROUS)._cache.remove(path)
    assert questions(source) == whole
    assert {server.gets[path.name] for path in shards} == {2}, "fetched again, once"


def test_patterns_and_a_media_root_elsewhere(
    folder: Path, server: FileServer, tmp_path: Path
) -> None:
    files = remote(tmp_path)
    stale = files.path_of(f"{server.url}/structs/data/train-00009-of-00002.parquet")
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an object that is gone")
    part = open_source(
        f"{server.url}/structs/data/train-*.parquet", columns=COLUMNS["structs"], files=files
    )
    assert len(part) == NUM_ROWS
    whole = open_source(f"{server.url}/structs", columns=COLUMNS["structs"], files=files)
    assert len(whole) == NUM_ROWS
    assert not stale.exists()
    row = {"question": "1 + 1 = ?", "answer": "2", "image": "1.png"}
    lines = write_lines(tmp_path / "mine.jsonl", [row, {**row, "image": "../shards/x.png"}])
    source = open_source(lines, media_root=f"{server.url}/pictures", files=files)
    store = MediaStore(MediaLimits(), files)
    (image,) = source.question(*source.keys()[0]).media
    assert store.read(image) == (folder / "pictures/1.png").read_bytes()
    (outside,) = source.question(*source.keys()[1]).media
    with pytest.raises(SampleError, match=r"x\.png") as caught:
        source.media_bytes(outside)
    assert caught.value.reason in ("outside_root", "missing_media")
    store.close()


def test_lint_checks_what_is_behind_an_address(
    own: tuple[Path, FileServer], tmp_path: Path
) -> None:
    served, server = own
    shard = served / "shards" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # inside the first question
    shard.write_bytes(content)
    lines = [{"question": "?", "answer": "1", "image": "gone.png"}, {"question": "?"}]
    write_lines(served / "q.jsonl", lines)
    files = remote(tmp_path)
    table = open_source(f"{server.url}/q.jsonl", files=files)
    folder = files.path_of(f"{server.url}/shards")
    count, problems = lint([folder, table], MediaOpener(MediaLimits()), files=files)
    assert count == NUM_ROWS + 2
    assert [(Path(each.where).name, each.reason) for each in problems] == [
        ("shard-000001.tar:000000006", "bad_shard"),
        ("q.jsonl:1", "missing"),
        ("q.jsonl:2", "bad_field"),
    ]


def test_requests_are_repeated_a_few_times(own: tuple[Path, FileServer], tmp_path: Path) -> None:
    served, server = own
    write_lines(served / "q.jsonl", [{"question": "?", "answer": "1"}])
    server.failures["q.jsonl"] = 4  # a description takes two requests
    files = remote(tmp_path)
    assert len(open_source(f"{server.url}/q.jsonl", files=files)) == 1
    assert files.counts["retried"] == 2
    server.failures["shard-000000.tar"] = 6
    with pytest.raises(
        DataError, match=r"000000\.tar: cannot be fetched, got .*503.* 3 attempts, ex"
    ):
        open_source(f"{server.url}/shards", files=files)
    assert files.counts["retried"] == 4


def test_an_object_that_was_changed_since_the_start_is_noticed(
    own: tuple[Path, FileServer], tmp_path: Path
) -> None:
    served, server = own
    files = remote(tmp_path)
    source = open_source(f"{server.url}/shards", files=files)
    shard = served / "shards" / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")  # of the same size
    in_first = source.keys()[0]
    in_second = next(key for key in source.keys() if key[0].endswith(shard.name))  # noqa: SIM118
    assert source.question(*in_first)
    with pytest.raises(DataError, match=r"shard-000001\.tar: the object was changed, got version"):
        source.question(*in_second)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: no such object"):
        source.question(*in_second)
    shard.write_bytes(content)
    assert source.question(*in_second)
    # Another run finds a new version where an old one was cached.
    write_lines(served / "questions.jsonl", [{"question": "old?", "answer": "1"}])
    assert questions(open_source(f"{server.url}/questions.jsonl", files=files))[0].text == "old?"
    write_lines(served / "questions.jsonl", [{"question": "new?", "answer": "1"}])
    later = open_source(f"{server.url}/questions.jsonl", files=remote(tmp_path))
    assert questions(later)[0].text == "new?"


def test_a_shard_without_an_index_is_fetched_and_scanned(
    own: tuple[Path, FileServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served, server = own
    local = [question.id for question in questions(open_source(served / "shards"))]
    first, second, _ = sorted((served / "shards").glob("*.json"))
    first.unlink()
    second.write_text("no index")
    source = open_source(f"{server.url}/shards", files=remote(tmp_path))
    assert [question.id for question in questions(source)] == local
    assert "the index is unreadable" in caplog.text
    assert server.gets["shard-000002.tar"] == 1
    shard = served / "shards" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    with pytest.raises(DataError, match=r"shard-000002\.tar: the shard and its index differ"):
        open_source(f"{server.url}/shards", files=remote(tmp_path))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/set", r"s3:// needs a package .* pip install 'zppo-mm\[s3\]'"),
        ("gs://bucket/set", r"gs:// needs a package .* pip install 'zppo-mm\[gs\]'"),
        ("nosuch://bucket/set", "unknown kind of address, got nosuch://, expected one that fsspec"),
        ("memory://", "not an address of a file or folder, got empty parts or dots"),
        ("memory://a//b", "not an address of a file or folder"),
        ("memory://a/../b", "not an address of a file or folder"),
        ("memory://gone/set", "no such object, got FileNotFoundError"),
        ("memory://gone/q.jsonl", "no such object, expected a file; correct the address"),
        ("memory://gone/*.jsonl", "nothing to read there, got no such file, expected shards"),
        ("memory://full/plain", "nothing to read there, got no such file, expected shards"),
        ("memory://full/mixed", "files of several kinds, got shards and tables"),
    ],
)
def test_an_address_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    store = fsspec.filesystem("memory")
    store.pipe({"/full/plain/x.txt": b"x", "/full/mixed/a.tar": b"x", "/full/mixed/b.jsonl": b"x"})
    with pytest.raises(DataError, match=message) as caught:
        open_source(address, files=remote(tmp_path))
    assert str(caught.value).startswith(address.removesuffix("/"))


def test_without_a_cache_an_address_is_refused() -> None:
    assert is_address("s3://bucket/set")
    assert not is_address("/data/set")
    assert not is_address("C:/data")
    with pytest.raises(DataError, match="an address, got no cache for files of other machines"):
        open_source("s3://bucket/set")


def test_a_cache_that_cannot_be_written_is_named(
    own: tuple[Path, FileServer], tmp_path: Path
) -> None:
    _, server = own
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(DataError, match=r"cannot be kept in .*cache \(Not a directory\)"):
        open_source(f"{server.url}/for_shards.jsonl", files=remote(tmp_path))


def test_refusals_and_silent_servers_are_named(
    own: tuple[Path, FileServer], tmp_path: Path
) -> None:
    _, server = own
    address = f"{server.url}/for_shards.jsonl"
    server.status, server.failures["for_shards.jsonl"] = 403, 99
    files = remote(tmp_path)
    with pytest.raises(DataError, match=r"cannot be fetched, got .*403.* set the credentials"):
        open_source(address, files=files)
    assert files.counts["retried"] == 0
    server.status = 404
    with pytest.raises(DataError, match=r"for_shards\.jsonl: no such object, expected a file"):
        open_source(address, files=remote(tmp_path))
    with pytest.raises(
        DataError, match=r"cannot be fetched, got .*Cannot connect.* 3 attempts, exp"
    ):
        open_source(f"http://127.0.0.1:{free_port()}/q.jsonl", files=remote(tmp_path))

"""Shards that are damaged, foreign or made to harm: an error that names them, or exactly what they
hold.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import webdataset

from data.errors import DataError, SampleError
from data.lint import lint
from data.media.opening import MediaLimits, MediaOpener
from data.shard_writer import write_shards
from data.shards import ShardFolder, ShardReader
from data.tar_index import load_index, sidecar_path
from data.tar_members import MAX_HEADER_BYTES
from tests.support.shard_samples import END, QUESTION, header, member, pax, png, sample

GOOD = member("a.json", QUESTION)
MAX_SECONDS = 20  # each takes milliseconds; a hang takes for ever
HUGE = 1 << 60


def base_256(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + (number % (1 << 88)).to_bytes(11)


def samples_of(folder: ShardFolder) -> list[tuple[str, str]]:
    return list(folder.keys())


HOSTILE = {
    "negative octal size": (
        header("b.json", octal=b"-0000001000") + END,
        "got a size of -512 bytes|goes on after its end",
    ),
    "negative base-256 size": (
        header("b.json", octal=base_256(-512)) + END,
        "got a size of -512 bytes|goes on after its end",
    ),
    "huge base-256 size": (header("b.json", octal=base_256(HUGE)) + END, "ends inside a member"),
    "huge octal size": (header("b.json", octal=b"7" * 11) + END, "ends inside a member"),
    "no number as size": (header("b.json", octal=b"12z") + END, "goes on after its end"),
    "pax size beyond the file": (
        pax(b"size=99999999999999999999") + GOOD,
        "got a size of 99999999999999999999 bytes",
    ),
    "negative pax size": (
        pax(b"size=-512") + header("b.json") + END,
        "got a size of -512 bytes|damaged tar header",
    ),
    "pax size of 5,000 digits": (
        pax(b"size=" + b"9" * 5000) + member("b.json", QUESTION),
        "goes on after its end",
    ),
    "pax length of 5,000 digits": (
        member("p", b"9" * 5000 + b" path=b\n", kind=b"x") + GOOD,
        "damaged tar header",
    ),
    "pax length of 0": (member("p", b"0 path=b\n", kind=b"x") + GOOD, "goes on after its end"),
    "pax sparse file": (
        pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + member("b.json", QUESTION),
        "got a sparse file|damaged tar header",
    ),
    "name for all members": (
        pax(b"path=b.json", kind=b"g") + GOOD,
        "one name or size for all members",
    ),
    "thousands of extended headers": (
        pax(b"comment=b") * 5000 + GOOD,
        "extended headers too long",
    ),
    "extended header without a member": (pax(b"path=b.json"), "damaged tar header at byte 1024"),
    "long extended header": (
        member("p", b"0" * (MAX_HEADER_BYTES + 1), kind=b"x") + GOOD,
        "extended headers too long",
    ),
    "extended header beyond the file": (
        header("p", kind=b"L", octal=base_256(HUGE)) + GOOD,
        "extended headers too long",
    ),
    "negative extended header": (
        header("p", kind=b"L", octal=base_256(-HUGE)) + GOOD,
        "extended headers too long|goes on after its end",
    ),
    "old sparse file": (member("b.json", QUESTION, kind=b"S"), "a sparse file"),
    "symbolic link": (header("b.json", kind=b"2"), "a symbolic link"),
    "hard link": (header("b.json", kind=b"1"), "a hard link"),
    "character device": (header("b.json", kind=b"3"), "a device"),
    "block device": (header("b.json", kind=b"4"), "a device"),
    "FIFO": (header("b.json", kind=b"6"), "a FIFO"),
    "unknown kind": (member("b.json", QUESTION, kind=b"Z"), "a member of type b'Z'"),
    "folder with content": (member("b/", QUESTION, kind=b"5"), "a member of type b'5'"),
    "the same file twice": (GOOD, "json twice"),
    "a sample in two parts": (
        member("b.json", QUESTION) + member("a.png", b"x"),
        "files of one sample are apart",
    ),
    "zeros in the middle": (END + member("b.json", QUESTION), "goes on after its end"),
    "holes at the end": (b"\0" * 20_000, "goes on after its end"),
    "text": (b"no header at all" * 64, "goes on after its end at byte 1024"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_shard_is_an_error_of_its_own(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + content + END)
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        ShardFolder(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert [(problem.where, problem.reason) for problem in lint([tmp_path])[1]] == [
        (str(path), "bad_shard")
    ]
    assert time.monotonic() - start < MAX_SECONDS


ACCEPTED = {
    "folders": (header("f/", kind=b"5") + member("b.json", QUESTION), ["a", "b"]),
    "a long name": (
        member("l", b"b" * 200 + b".json\0", kind=b"L") + member("b" * 100, QUESTION),
        ["a", "b" * 200],
    ),
    "a pax name": (pax(b"path=b.json", b"mtime=1.5") + member("c.json", QUESTION), ["a", "b"]),
    "a pax size": (pax(b"size=%d" % len(QUESTION)) + member("b.json", QUESTION), ["a", "b"]),
    "a comment for all": (pax(b"comment=1", kind=b"g") + member("b.json", QUESTION), ["a", "b"]),
    "an old header": (member("b.json", QUESTION, kind=b"\0"), ["a", "b"]),
    "metadata of webdataset": (
        member("__meta__/b.json", QUESTION) + member("__info__", b""),
        ["a"],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_webdataset_reads_is_read_here(tmp_path: Path, name: str) -> None:
    content, keys = ACCEPTED[name]
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + content + END)
    folder = ShardFolder(tmp_path)
    assert [key for _, key in samples_of(folder)] == keys
    assert all(folder.question(shard, key).answer == "2" for shard, key in samples_of(folder))
    theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert [each["__key__"] for each in theirs] == keys
    assert all(each["json"] == QUESTION for each in theirs)


def test_files_that_belong_to_no_sample_are_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + member("README", b"x") + member(".hidden", b"y") + END)
    assert list(load_index(path).samples) == ["a"]
    assert "skipped 2 files that have no extension, the first is README" in caplog.text


def test_a_shard_cut_at_any_block_is_an_error(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(index, [("png", png())]) for index in range(4)])
    whole = shard.read_bytes()
    ends = [
        found.offset + 512 for members in load_index(shard).samples.values() for found in members
    ]
    for has_index in (True, False):
        if not has_index:
            sidecar_path(shard).unlink()
        for size in range(0, max(ends) + 1024, 512):
            shard.write_bytes(whole[:size])
            with pytest.raises(
                DataError,
                match=r"the shard and its index differ, got \d+ bytes"
                if has_index
                else "cut off|ends inside|empty file",
            ):
                ShardFolder(tmp_path)
            assert lint([tmp_path])[0] == 0
            assert [problem.reason for problem in lint([tmp_path])[1]] == ["bad_shard"]


@pytest.mark.medium
def test_thousands_of_files_in_one_sample_take_no_longer_than_in_many(tmp_path: Path) -> None:
    content = GOOD + b"".join(header(f"a.{index}.png") for index in range(20_000)) + END
    (tmp_path / "a.tar").write_bytes(content)
    start = time.process_time()
    folder = ShardFolder(tmp_path)
    with pytest.raises(SampleError, match="too many media files, got 20000"):
        folder.question(*folder.keys()[0])
    assert time.process_time() - start < MAX_SECONDS


def test_a_shard_that_changes_under_a_reader_is_noticed(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(0, [("png", png())]), sample(1)])
    reader = ShardReader()
    assert reader.question(str(shard), "000000").id == "q0"
    os.truncate(shard, 1500)
    with pytest.raises(
        DataError, match=r"000001\.json: the index does not fit the shard, got no header"
    ):
        reader.question(str(shard), "000001")
    reader.close()
    shard.unlink()
    with pytest.raises(DataError, match="the shard cannot be opened"):
        reader.question(str(shard), "000000")


def test_shards_of_the_webdataset_writer_train_here(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "part-%03d.tar"), maxcount=2, verbose=0) as writer:
        for index in range(5):
            writer.write(
                {
                    "__key__": f"clip{index}",
                    "json": {**json.loads(QUESTION), "id": f"q{index}"},
                    "1.png": png(value=index),
                    "cls": index,
                }
            )
    assert lint([tmp_path], MediaOpener(MediaLimits())) == (5, [])
    folder = ShardFolder(tmp_path)
    questions = [folder.question(*key) for key in samples_of(folder)]
    assert [question.id for question in questions] == [f"q{index}" for index in range(5)]
    assert [folder.media_bytes(question.media[0]) for question in questions] == [
        png(value=index) for index in range(5)
    ]

"""Shards, indexes and folders that are damaged, foreign or made to harm: an error that names them, or exactly what they hold."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from data.errors import DataError, SampleError
from data.lint import lint
from data.media import MediaLimits, MediaOpener
from data.question import MediaRef
from data.shards import ShardFolder, ShardReader, write_shards
from data.tar_index import load_index, scan_tar, sidecar_path
from data.tar_members import MAX_EXTENSION_BYTES
from tests.unit.shard_samples import END, QUESTION, header, member, pax, png, sample

GOOD = member("a.json", QUESTION)
MAX_SECONDS = 20  # each takes milliseconds; a hang takes for ever
HUGE = 1 << 60


def base_256(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + (number % (1 << 88)).to_bytes(11)


HOSTILE = {
    "negative octal size": (header("b.json", octal=b"-0000001000") + END, "got a size of -512 bytes"),
    "negative base-256 size": (header("b.json", octal=base_256(-512)) + END, "got a size of -512 bytes"),
    "huge base-256 size": (header("b.json", octal=base_256(HUGE)) + END, "ends inside a member"),
    "huge octal size": (header("b.json", octal=b"7" * 11) + END, "ends inside a member"),
    "no number as size": (header("b.json", octal=b"12z") + END, "damaged tar header at byte 1024"),
    "pax size beyond the file": (pax(b"size=99999999999999999999") + GOOD, "got a size of 99999999999999999999 bytes"),
    "negative pax size": (pax(b"size=-512") + header("b.json") + END, "a size of b'-512'"),
    "pax size of 5,000 digits": (pax(b"size=" + b"9" * 5000) + GOOD, "expected a number"),
    "pax length beyond the header": (member("p", b"99 path=b.json\n", kind=b"x") + GOOD, "expected LENGTH KEY=VALUE"),
    "pax length of 5,000 digits": (member("p", b"9" * 5000 + b" path=b\n", kind=b"x") + GOOD, "expected LENGTH KEY=VALUE"),
    "pax length of 0": (member("p", b"0 path=b\n", kind=b"x") + GOOD, "expected LENGTH KEY=VALUE"),
    "pax key twice": (pax(b"path=b.json", b"path=c.json") + GOOD, "each key once"),
    "pax sparse file": (pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + GOOD, "got a sparse file"),
    "name for all members": (pax(b"path=b.json", kind=b"g") + GOOD, "one name or size for all members"),
    "two long names": (member("l", b"b.json\0", kind=b"L") * 2 + GOOD, "two extended headers of one kind"),
    "long name and pax name": (member("l", b"b.json\0", kind=b"L") + pax(b"path=c.json") + GOOD, "two names for one member"),
    "thousands of extended headers": (pax(b"comment=b") * 5000 + GOOD, "two extended headers of one kind"),
    "extended header without a member": (pax(b"path=b.json"), "an extended header without its member"),
    "long extended header": (member("p", b"0" * (MAX_EXTENSION_BYTES + 1), kind=b"x") + GOOD, "an extended header of 65537 bytes"),
    "extended header beyond the file": (header("p", kind=b"L", octal=base_256(HUGE)) + GOOD, "ends inside a member"),
    "negative extended header": (header("p", kind=b"L", octal=base_256(-HUGE)) + GOOD, "ends inside a member"),
    "old sparse file": (member("b.json", QUESTION, kind=b"S"), "a sparse file"),
    "symbolic link": (header("b.json", kind=b"2"), "a symbolic link"),
    "hard link": (header("b.json", kind=b"1"), "a hard link"),
    "character device": (header("b.json", kind=b"3"), "a device"),
    "block device": (header("b.json", kind=b"4"), "a device"),
    "FIFO": (header("b.json", kind=b"6"), "a FIFO"),
    "unknown kind": (member("b.json", QUESTION, kind=b"Z"), "a member of type b'Z'"),
    "folder with content": (member("b/", QUESTION, kind=b"5"), "a member of type b'5'"),
    "the same file twice": (GOOD, "json twice"),
    "a sample in two places": (member("b.json", QUESTION) + member("a.png", b"x"), "files of one sample are apart"),
    "zeros in the middle": (END + member("b.json", QUESTION), "goes on after its end"),
    "holes at the end": (b"\0" * 20_000, "goes on after its end"),
    "text": (b"no header at all" * 64, "damaged tar header at byte 1024"),
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
    assert [(problem.where, problem.reason) for problem in lint([tmp_path])[1]] == [(str(path), "bad_shard")]
    assert time.monotonic() - start < MAX_SECONDS


ACCEPTED = {
    "folders": (header("f/", kind=b"5") + member("b.json", QUESTION), ["a", "b"]),
    "a long name": (member("l", b"b" * 200 + b".json\0", kind=b"L") + member("b" * 100, QUESTION), ["a", "b" * 200]),
    "a pax name": (pax(b"path=b.json", b"mtime=1.5") + member("c.json", QUESTION), ["a", "b"]),
    "a pax size": (pax(b"size=%d" % len(QUESTION)) + member("b.json", QUESTION), ["a", "b"]),
    "a comment for all": (pax(b"comment=1", kind=b"g") + member("b.json", QUESTION), ["a", "b"]),
    "an old header": (member("b.json", QUESTION, kind=b"\0"), ["a", "b"]),
    "metadata of webdataset": (member("__meta__/b.json", QUESTION) + member("__info__", b""), ["a"]),
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


def test_files_that_belong_to_no_sample_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + member("README", b"x") + member(".hidden", b"y") + END)
    assert list(load_index(path).samples) == ["a"]
    assert "skipped 2 files that have no extension, the first is README" in caplog.text


def test_a_shard_cut_at_any_block_is_an_error(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(index, [("png", png())]) for index in range(4)])
    whole = shard.read_bytes()
    ends = [found.offset + 512 for members in load_index(shard).samples.values() for found in members]
    for has_index in (True, False):
        if not has_index:
            sidecar_path(shard).unlink()
        for size in range(0, max(ends) + 1024, 512):
            shard.write_bytes(whole[:size])
            with pytest.raises(DataError, match=r"the shard and its index differ, got \d+ bytes" if has_index else "cut off|ends inside"):
                ShardFolder(tmp_path)
            assert lint([tmp_path])[0] == 0
            assert [problem.reason for problem in lint([tmp_path])[1]] == ["bad_shard"]


def test_the_size_that_the_index_knows_speaks_where_the_shard_looks_whole(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(index) for index in range(400)])
    # 400 headers and 400 blocks of JSON are 409,600 bytes, a whole number of records; the end of the archive takes one more.
    assert shard.stat().st_size == 409_600 + 10_240
    whole = shard.read_bytes()
    shard.write_bytes(whole[:65536] + END)
    with pytest.raises(DataError, match=r"got 66560 bytes in the shard, expected \d+ bytes with 400 samples as in shard-000000"):
        ShardFolder(tmp_path)
    sidecar_path(shard).unlink()
    assert len(ShardFolder(tmp_path)) == 64, "without an index nothing says that this is no whole archive"


def test_holes_where_content_should_be_are_found_when_they_are_read(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(index) for index in range(8)])
    whole = shard.read_bytes()
    shard.write_bytes(whole[:4096] + b"\0" * (len(whole) - 4096))
    folder = ShardFolder(tmp_path)
    assert len(folder) == 8
    with pytest.raises(DataError, match=r"the index does not fit the shard, got no header .* at byte 4096, expected 000004\.json"):
        folder.question(str(shard), "000004")
    assert [problem.reason for problem in lint([tmp_path])[1]] == ["wrong_index"]


def test_one_changed_bit_of_the_content_is_found_by_its_checksum(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(1, [("png", png())])])
    whole = bytearray(shard.read_bytes())
    whole[512 + 20] ^= 1
    whole[-9216 + 20] ^= 0
    picture = load_index(shard).samples["000001"][1]
    whole[picture.offset + 40] ^= 1
    shard.write_bytes(whole)
    folder = ShardFolder(tmp_path)
    with pytest.raises(DataError, match=r"000001\.json: the content is damaged, got checksum \d+, expected \d+"):
        folder.question(str(shard), "000001")
    with pytest.raises(DataError, match=r"000001\.png: the content is damaged"):
        folder.media_bytes(MediaRef("image", str(shard), "000001", "png"))
    problems = lint([tmp_path], MediaOpener(MediaLimits()))[1]
    assert [(problem.where, problem.reason) for problem in problems] == [(f"{shard}:000001", "bad_shard")]


def everything(reader: ShardReader, shard: str) -> list[tuple[str, str, list[bytes]]]:
    """Return key, question id and media of every sample."""
    questions = {key: reader.question(shard, key) for key in reader.index(shard).samples}
    return [(key, question.id, [reader.media_bytes(ref) for ref in question.media]) for key, question in questions.items()]


def samples_of(folder: ShardFolder) -> list[tuple[str, str]]:
    return list(folder.keys())


def edit(change: Callable[[dict[str, dict[str, list[object]]]], object]) -> Callable[[dict[str, object]], object]:
    return lambda stored: change(stored["samples"])  # type: ignore[arg-type]


BAD_INDEXES = {
    "negative offset": edit(lambda samples: samples["000001"]["json"].__setitem__(0, -512)),
    "huge offset": edit(lambda samples: samples["000001"]["json"].__setitem__(0, 1 << 80)),
    "negative size": edit(lambda samples: samples["000001"]["json"].__setitem__(1, -1)),
    "huge size": edit(lambda samples: samples["000001"]["json"].__setitem__(1, 1 << 80)),
    "smaller size": edit(lambda samples: samples["000001"]["json"].__setitem__(1, 20)),
    "number as text": edit(lambda samples: samples["000001"]["json"].__setitem__(0, "512")),
    "infinite offset": edit(lambda samples: samples["000001"]["json"].__setitem__(0, float("inf"))),
    "no size": edit(lambda samples: samples["000001"].__setitem__("json", [512])),
    "another sample's entries": edit(lambda samples: samples.update({"000001": samples["000002"], "000002": samples["000001"]})),
    "a sample less": edit(lambda samples: samples.pop("000001")),
    "the last sample less": edit(lambda samples: samples.pop("000003")),
    "a picture less": edit(lambda samples: samples["000001"].pop("png")),
    "a sample more": edit(lambda samples: samples.__setitem__("000009", samples["000001"])),
    "a sample without files": edit(lambda samples: samples.__setitem__("000009", {})),
    "another name of a picture": edit(lambda samples: samples["000001"].__setitem__("pxg", samples["000001"].pop("png"))),
    "another key": edit(lambda samples: [samples.__setitem__(f"x{key}", samples.pop(key)) for key in list(samples)]),
    "another order": edit(lambda samples: samples.__setitem__("000001", samples.pop("000001"))),
    "a key that no bytes spell": edit(lambda samples: samples.__setitem__("\ud800", samples.pop("000003"))),
    "size of the shard as text": lambda stored: stored.__setitem__("tar_size", "1"),
    "size of the shard wrong": lambda stored: stored.__setitem__("tar_size", 1),
    "size of the shard infinite": lambda stored: stored.__setitem__("tar_size", float("inf")),
    "samples as a list": lambda stored: stored.__setitem__("samples", []),
    "nothing": lambda stored: stored.clear(),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
@pytest.mark.parametrize("version", [1, 2])
def test_a_wrong_index_is_an_error_or_changes_nothing(tmp_path: Path, name: str, version: int) -> None:
    samples = [sample(index, [("png", png(value=index))]) for index in range(4)]
    (shard,) = write_shards(tmp_path, samples)
    stored = json.loads(sidecar_path(shard).read_text())
    if version == 1:
        entries = {key: {name: numbers[:2] for name, numbers in members.items()} for key, members in stored["samples"].items()}
        stored = {**stored, "version": 1, "samples": entries}
    BAD_INDEXES[name](stored)
    sidecar_path(shard).write_text(json.dumps(stored))
    assert [problem.reason for problem in lint([tmp_path])[1]] == ["wrong_index"]
    try:
        read = everything(ShardReader(), str(shard))
    except DataError as error:
        message = str(error)
    else:
        message = ""
        assert read == [(each.key, each.question["id"], [content for _, content in each.media]) for each in samples]
    assert message == "" or "the shard and its index differ" in message or "the index does not fit the shard" in message


def test_an_index_that_is_no_plain_file_or_too_large_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shard,) = write_shards(tmp_path, [sample(0)])
    sidecar_path(shard).unlink()
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        caplog.clear()
        make(sidecar_path(shard))
        assert list(load_index(shard).samples) == ["000000"]
        assert "idx.json: the index" in caplog.text
        (os.rmdir if sidecar_path(shard).is_dir() else os.unlink)(sidecar_path(shard))
    with sidecar_path(shard).open("wb") as file:
        file.truncate(200 << 30)
    assert list(load_index(shard).samples) == ["000000"]
    assert "expected at most" in caplog.text


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # addresses of sockets are short
        server.bind("socket.tar")
        os.mkfifo(tmp_path / "fifo.tar")
        (tmp_path / "folder.tar").mkdir()
        (tmp_path / "gone.tar").symlink_to(tmp_path / "nothing")
        (tmp_path / "turns.tar").symlink_to(tmp_path / "turns.tar")
        for name, message in (
            ("fifo", "no regular file, got a FIFO"),
            ("folder", "no regular file, got a folder"),
            ("gone", "cannot be opened .No such file"),
            ("turns", "cannot be opened .Too many levels of symbolic links"),
            ("socket", "cannot be opened"),
        ):
            with pytest.raises(DataError, match=rf"{name}\.tar: the shard .*{message}|{name}\.tar: the shard {message}"):
                ShardReader().index(str(tmp_path / f"{name}.tar"))
    with pytest.raises(DataError, match="no regular file, got a device"):
        scan_tar(Path("/dev/zero"))
    problems = lint([tmp_path])[1]
    assert [Path(problem.where).stem for problem in problems] == ["fifo", "folder", "gone", "socket", "turns"]
    assert {problem.reason for problem in problems} == {"bad_shard"}


def test_a_shard_of_holes_is_not_read_through(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(DataError, match="goes on after its end at byte 0, got 214748364800 bytes"):
        ShardFolder(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DataError, match="the shard holds no sample"):
        ShardFolder(tmp_path)


LOOKS_LIKE_A_SHARD = {
    "b.tar.gz": "a compressed shard is not read",
    "b.TGZ": "a compressed shard is not read",
    "b.tar.zst": "a compressed shard is not read",
    "b.tar.idx.json": "an index without its shard",
    "b.tar.tmp": "not written or copied to its end",
    "b.tar.123.tmp": "not written or copied to its end",
    "b.tar.part": "not written or copied to its end",
    ".b.tar.Ab12Cd": "not written or copied to its end",
    "b.TAR": "suffix .tar in lower case",
    os.fsdecode(b"b\xff.tar"): "no UTF-8",
}


@pytest.mark.parametrize("name", LOOKS_LIKE_A_SHARD)
def test_what_looks_like_a_shard_is_never_passed_over_in_silence(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, [sample(0)])
    (tmp_path / "README.md").write_text("is no shard")
    (tmp_path / "shard-000000.tar.sha256").write_text("nor is this")
    assert lint([tmp_path]) == (1, [])
    (tmp_path / name).write_bytes(GOOD + END)
    with pytest.raises(DataError, match=LOOKS_LIKE_A_SHARD[name]):
        ShardFolder(tmp_path)
    count, problems = lint([tmp_path])
    assert (count, [problem.reason for problem in problems]) == (1, ["unread_shard"])
    assert problems[0].message.encode()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (private,) = write_shards(tmp_path / "private", [sample(0)])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").symlink_to(private)
    with pytest.raises(DataError, match=r"a\.tar: a link that leads out of the folder"):
        ShardFolder(tmp_path / "shards")
    assert [problem.reason for problem in lint([tmp_path / "shards"])[1]] == ["no_shards", "unread_shard"]
    (tmp_path / "named").symlink_to(tmp_path / "private")
    assert len(ShardFolder(tmp_path / "named")) == 1, "the folder itself may be a link"
    (tmp_path / "private" / "again.tar").symlink_to(private.name)
    assert len(ShardFolder(tmp_path / "private")) == 2


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
    with pytest.raises(DataError, match=r"000001\.json: the index does not fit the shard, got no header"):
        reader.question(str(shard), "000001")
    reader.close()
    shard.unlink()
    with pytest.raises(DataError, match="the shard cannot be opened"):
        reader.question(str(shard), "000000")


def test_shards_are_written_all_or_none(tmp_path: Path) -> None:
    write_shards(tmp_path, [sample(index) for index in range(4)], 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def breaks_off() -> Callable[[], object]:
        yield sample(10)
        yield sample(11)
        raise DataError("too many bad samples")

    with pytest.raises(DataError, match="too many bad samples"):
        write_shards(tmp_path, breaks_off(), 1, overwrite=True)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_writer_leaves_is_not_read_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar.tmp").write_bytes(GOOD + END)
    (tmp_path / "shard-000001.tar.tmp.idx.json").write_text("{}")
    (tmp_path / "shard-000002.tar.idx.json").write_text("{}")
    with pytest.raises(DataError, match="not written or copied to its end"):
        ShardFolder(tmp_path)
    write_shards(tmp_path, [sample(0)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.tar", "shard-000000.tar.idx.json"]


def test_shards_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the shards cannot be written"):
        write_shards(tmp_path / "file" / "shards", [sample(0)])
    for bad in ({"question": "\ud800"}, {"x": float("nan")}, {"x": {1}}):
        with pytest.raises(DataError, match=r"000000: the question cannot be written as JSON"):
            write_shards(tmp_path / "out", [sample(0, **bad)])
    for key in ("a\0b", "\ud800", "a/../b", "__meta__/a"):
        with pytest.raises(DataError, match=r"key is not allowed|extension is no media file's"):
            write_shards(tmp_path / "out", [sample(0), type(sample(0))(key, {}, [("png", b"")])])
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_of_the_webdataset_writer_train_here(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "part-%03d.tar"), maxcount=2, verbose=0) as writer:
        for index in range(5):
            writer.write(
                {"__key__": f"clip{index}", "json": {**json.loads(QUESTION), "id": f"q{index}"}, "1.png": png(value=index), "cls": index}
            )
    assert lint([tmp_path], MediaOpener(MediaLimits())) == (5, [])
    folder = ShardFolder(tmp_path)
    questions = [folder.question(*place) for place in samples_of(folder)]
    assert [question.id for question in questions] == [f"q{index}" for index in range(5)]
    assert [folder.media_bytes(question.media[0]) for question in questions] == [png(value=index) for index in range(5)]

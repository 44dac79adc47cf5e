"""Folders of shards: what looks like a shard and is none, and shards that are written all or
none.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import DataError
from data.lint import lint
from data.shard_writer import write_shards
from data.shards import ShardFolder, ShardReader
from data.tar_index import scan_tar
from tests.support.shard_samples import END, QUESTION, member, sample

GOOD = member("a.json", QUESTION)


def test_what_is_no_regular_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # addresses of sockets are short
        server.bind("socket.tar")
        os.mkfifo(tmp_path / "fifo.tar")
        (tmp_path / "folder.tar").mkdir()
        (tmp_path / "gone.tar").symlink_to(tmp_path / "nothing")
        (tmp_path / "turns.tar").symlink_to(tmp_path / "turns.tar")
        for name, message in (
            ("fifo", "not a regular file, got a FIFO"),
            ("folder", "not a regular file, got a folder"),
            ("gone", "cannot be opened .No such file"),
            ("turns", "cannot be opened .Too many levels of symbolic links"),
            ("socket", "cannot be opened"),
        ):
            with pytest.raises(
                DataError,
                match=rf"{name}\.tar: the shard .*{message}|{name}\.tar: the shard {message}",
            ):
                ShardReader().index(str(tmp_path / f"{name}.tar"))
    with pytest.raises(DataError, match="not a regular file, got a device"):
        scan_tar(Path("/dev/zero"))
    problems = lint([tmp_path])[1]
    assert [Path(problem.where).stem for problem in problems] == [
        "fifo",
        "folder",
        "gone",
        "socket",
        "turns",
    ]
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
    "b.tar.part-00": "not written or copied to its end",
    "b.tar.filepart": "not written or copied to its end",
    "b.tar.aa": "not written or copied to its end",
    "b.tar.001": "not written or copied to its end",
    "b.tar.gz.part1": "not written or copied to its end",
    "b.tar.7z": "a compressed shard is not read",
    ".b.tar.Ab12Cd": "not written or copied to its end",
    "b.TAR": "suffix .tar in lower case",
    os.fsdecode(b"b\xff.tar"): "not UTF-8",
}


@pytest.mark.parametrize("name", LOOKS_LIKE_A_SHARD)
def test_what_looks_like_a_shard_is_never_passed_over_in_silence(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, [sample(0)])
    (tmp_path / "README.md").write_text("is no shard")
    for beside in ("sha256", "md5", "idx", "index", "lock", "json", "txt"):
        (tmp_path / f"shard-000000.tar.{beside}").write_text("nor is this")
    (tmp_path / "._shard-000000.tar").write_bytes(b"\0\5\x16\7 what macOS keeps beside a file")
    assert lint([tmp_path]) == (1, [])
    (tmp_path / name).write_bytes(GOOD + END)
    with pytest.raises(DataError, match=LOOKS_LIKE_A_SHARD[name]):
        ShardFolder(tmp_path)
    count, problems = lint([tmp_path])
    assert (count, [problem.reason for problem in problems]) == (1, ["unread_shard"])
    assert problems[0].message.encode()


def test_links_to_shards_are_read_wherever_they_lead(tmp_path: Path) -> None:
    # Caches of a hub, and folders that gather shards of several disks, are made of such links.
    (stored,) = write_shards(tmp_path / "stored", [sample(0)])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").symlink_to(stored)
    assert lint([tmp_path / "shards"]) == (1, [])
    (tmp_path / "named").symlink_to(tmp_path / "shards")
    assert len(ShardFolder(tmp_path / "named")) == 1


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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-000000.tar",
        "shard-000000.tar.idx.json",
    ]


def test_shards_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the shards cannot be written"):
        write_shards(tmp_path / "file" / "shards", [sample(0)])
    for bad in ({"question": "\ud800"}, {"x": float("nan")}, {"x": {1}}):
        with pytest.raises(DataError, match=r"000000: the question cannot be written as JSON"):
            write_shards(tmp_path / "out", [sample(0, **bad)])
    for key in ("a\0b", "\ud800", "a/../b", "__meta__/a"):
        with pytest.raises(DataError, match=r"key is not allowed|extension is not a media file's"):
            write_shards(tmp_path / "out", [sample(0), type(sample(0))(key, {}, [("png", b"")])])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_whose_path_no_log_can_hold_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / "a.tar").write_bytes(GOOD + END)
    with pytest.raises(DataError, match=r"udcff: the path of the folder is not UTF-8") as caught:
        ShardFolder(folder)
    assert str(caught.value).encode()


@pytest.mark.parametrize("number", [0, -3])
def test_a_shard_holds_at_least_one_sample(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError, match=f"no samples per shard, got {number}, expected at least 1"):
        write_shards(tmp_path, [sample(0)], number)
    assert list(tmp_path.iterdir()) == []

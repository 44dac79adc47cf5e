"""The cache of fetched files: each once for all processes, within its limit, those in use kept."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import file_cache
from data.file_cache import FileCache, NoRoomError
from data.file_lock import unlock_and_close

SIZE = 100


def fetch_of(content: bytes, fetched: list[Path]) -> Callable[[Path], None]:
    def fetch(target: Path) -> None:
        fetched.append(target)
        target.write_bytes(content)

    return fetch


def read(cache: FileCache, name: str, fetched: list[Path], stamp: int = 7) -> bytes:
    path = cache.root / name
    descriptor = cache.open(path, SIZE, stamp, fetch_of(name[0].encode() * SIZE, fetched))
    try:
        return os.read(descriptor, SIZE + 1)
    finally:
        unlock_and_close(descriptor)


def kept(cache: FileCache) -> set[str]:
    return {path.name for path in cache.root.rglob("*.tar")}


def last_read(cache: FileCache, name: str, seconds: int) -> None:
    os.utime(cache.root / name, (seconds, (cache.root / name).stat().st_mtime))


def test_a_file_is_fetched_once_for_all_who_ask_at_the_same_time(tmp_path: Path) -> None:
    fetched: list[Path] = []
    together = threading.Barrier(4)
    contents: list[bytes] = []

    def fetch(target: Path) -> None:
        time.sleep(0.2)  # the others come to wait; where they do not, the test still holds
        fetch_of(b"a" * SIZE, fetched)(target)

    def ask() -> None:
        cache = FileCache(tmp_path, 1000)  # as other processes have: locks are of open files
        together.wait()
        descriptor = cache.open(tmp_path / "a/x.tar", SIZE, 7, fetch)
        contents.append(os.read(descriptor, SIZE + 1))
        unlock_and_close(descriptor)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [b"a" * SIZE] * 4
    assert len(fetched) == 1
    assert fetched[0].name != "x.tar"  # it has its name when it is complete


def test_what_was_read_least_recently_makes_way_but_nothing_in_use(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 3 * SIZE)
    fetched: list[Path] = []
    for name in ("a.tar", "b.tar", "c.tar"):
        read(cache, name, fetched)
    for seconds, name in enumerate(("b.tar", "a.tar", "c.tar"), 1000):
        last_read(cache, name, seconds)
    in_use = cache.open(tmp_path / "b.tar", SIZE, 7, fetch_of(b"", fetched))
    last_read(cache, "b.tar", 999)
    read(cache, "d.tar", fetched)
    assert kept(cache) == {"b.tar", "c.tar", "d.tar"}
    unlock_and_close(in_use)
    last_read(cache, "b.tar", 999)
    read(cache, "e.tar", fetched)
    assert kept(cache) == {"c.tar", "d.tar", "e.tar"}
    assert cache.counts["evicted"] == 2
    assert len(fetched) == 5
    assert read(cache, "b.tar", fetched) == b"b" * SIZE  # fetched again
    assert len(fetched) == 6


def test_a_file_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_cache, "WAIT_SECONDS", 0.0)
    cache = FileCache(tmp_path, SIZE + 50)
    in_use = cache.open(tmp_path / "a.tar", SIZE, 7, fetch_of(b"a" * SIZE, []))
    with pytest.raises(NoRoomError, match=r"got 100 bytes for .*b\.tar beside 100 in use"):
        read(cache, "b.tar", [])
    unlock_and_close(in_use)
    with pytest.raises(NoRoomError, match="expected at most 50"):
        read(FileCache(tmp_path, 50), "b.tar", [])
    assert read(cache, "b.tar", []) == b"b" * SIZE


def test_another_version_is_fetched_again_and_takes_the_place(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2 * SIZE)
    fetched: list[Path] = []
    for stamp, times in ((7, 1), (7, 1), (8, 2), (7, 3)):
        read(cache, "a.tar", fetched, stamp)
        assert len(fetched) == times
    assert (tmp_path / file_cache.TOTAL).read_text().strip() == str(SIZE)


def test_what_failed_or_was_killed_leaves_nothing(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 2 * SIZE)

    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network is gone"):
        cache.open(tmp_path / "a.tar", SIZE, 7, fail)
    assert not [path for path in tmp_path.iterdir() if "a.tar" in path.name]
    assert (tmp_path / file_cache.TOTAL).read_text().strip() == "0"
    # A process that is killed leaves its part, and what it reserved.
    (tmp_path / f".k.tar.{SIZE}.part").write_bytes(b"half")
    (tmp_path / file_cache.TOTAL).write_text(str(9 * SIZE))
    fetched: list[Path] = []
    read(cache, "a.tar", fetched)
    read(cache, "b.tar", fetched)
    assert kept(cache) == {"a.tar", "b.tar"}
    assert not list(tmp_path.glob(".*.part"))


def test_what_another_process_is_fetching_counts_with_its_whole_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_cache, "WAIT_SECONDS", 0.0)
    cache, other = FileCache(tmp_path, SIZE + 50), FileCache(tmp_path, SIZE + 50)

    def fetch(target: Path) -> None:
        target.write_bytes(b"a")  # the first byte is here
        # Not one that shares the lock of the first.
        name = next(
            name
            for name in ("b.tar", "c.tar", "d.tar")
            if _lock_of(other, name) != _lock_of(other, "a.tar")
        )
        with pytest.raises(NoRoomError, match="beside 100 in use"):
            read(other, name, [])
        assert target.exists()
        target.write_bytes(b"a" * SIZE)

    unlock_and_close(cache.open(tmp_path / "a.tar", SIZE, 7, fetch))


def _lock_of(cache: FileCache, name: str) -> str:
    return cache.lock_of(cache.root / name).name

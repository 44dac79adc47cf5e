"""Arrays that processes of one machine share: made once, whatever becomes of the process that makes
them, and never more than the limit.
"""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError, MediaError, ReasonedError
from data.file_lock import locked
from data.media.array_file import MAPPED_BYTES, Stored
from data.media.node_cache import NodeCache
from data.media.node_folder import NodeFolder

GENEROUS = 1 << 30
START_SECONDS = 120.0  # of a process on a busy machine


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[NodeCache]:
    made = NodeCache("run", GENEROUS, tmp_path)
    yield made
    made.close()


def stored(number: float, count: int = 100) -> Stored:
    return {"number": number}, np.full(count, number, np.float32)


def never() -> Stored:
    raise AssertionError("made although it is there")


def files(cache: NodeCache) -> set[str]:
    return {path.name for path in cache._folder.path.iterdir()} - {"alive", "lock"}


@pytest.mark.parametrize("count", [0, 100, MAPPED_BYTES], ids=["empty", "read", "mapped"])
def test_what_one_process_makes_the_other_finds(
    cache: NodeCache, tmp_path: Path, count: int
) -> None:
    array = np.arange(count, dtype=np.float32).reshape(-1, 10 if count == 100 else 1)
    header = {"grid": (1, 2, 3), "seconds": 0.1 + 0.2, "name": "\udcff é"}
    other = NodeCache("run", GENEROUS, tmp_path)
    for each, make in ((cache, lambda: (header, array)), (other, never), (cache, never)):
        found_header, found = each.get("key", make)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert found.shape == array.shape
        assert found_header == {**header, "grid": [1, 2, 3]}
        with pytest.raises(ValueError, match="read-only"):
            found[...] = 0
    assert (cache.counts, other.counts) == ({"opened": 1, "found": 1}, {"found": 1})
    other.close()


def test_an_array_outlives_its_file(cache: NodeCache) -> None:
    _, array = cache.get("key", lambda: stored(7.0, MAPPED_BYTES))
    view = array[5:]
    cache.close()
    assert not cache._folder.path.exists()
    del array
    gc.collect()
    assert (view == 7.0).all()


def test_no_descriptor_is_held_for_an_array(cache: NodeCache) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    kept = [cache.get(f"k{n}", lambda: stored(1.0, MAPPED_BYTES)) for n in range(20)]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 20


def test_many_threads_make_it_once(cache: NodeCache) -> None:
    at_once = threading.Barrier(8)
    numbers: list[float] = []

    def ask() -> None:
        at_once.wait()
        for number in range(20):
            header, array = cache.get(f"k{number}", partial(stored, float(number)))
            numbers.append(float(array[0]) - header["number"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers == [0.0] * 160
    assert cache.counts == {"opened": 20, "found": 140}


def waiting_for(cache: NodeCache, key: str, make: Callable[[], Stored]) -> tuple[list[object], ...]:
    """Ask for a key in a thread while this one makes it, and keeps it; returns what each of them
    got.
    """
    results: list[object] = []
    kept: list[Stored] = []

    def ask() -> None:
        try:
            results.append(float(cache.get(key, lambda: stored(2.0))[1][0]))
        except ReasonedError as error:
            results.append((error.reason, str(error)))

    thread = threading.Thread(target=ask, daemon=True)

    def make_while_asked() -> Stored:
        thread.start()
        while not is_waiting(cache, key):
            pass
        return make()

    own: list[object] = []
    try:
        kept.append(cache.get(key, make_while_asked))
        own.append(float(kept[0][1][0]))
    except DataError as error:
        own.append(str(error))
    thread.join(START_SECONDS)
    assert not thread.is_alive(), "the lock is held as long as the array"
    return own, results


def is_waiting(cache: NodeCache, key: str) -> bool:
    """Return whether two have the file open that is to become that of a key."""
    part = os.path.realpath(cache._part(key))
    names = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(name) == part for name in names) == 2


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="sees waiting by /proc")


@needs_proc
def test_who_waits_gets_the_array_or_its_failure(cache: NodeCache) -> None:
    def fail() -> Stored:
        raise MediaError("timeout", "too slow")

    def break_down() -> Stored:
        raise DataError("the shard is gone")

    for count in (1, MAPPED_BYTES):
        made = partial(stored, 1.0, count)
        assert waiting_for(cache, f"good{count}", made) == ([1.0], [1.0])
    # Who asked at that time fails with it; who asks later tries again.
    assert waiting_for(cache, "bad", fail) == (["too slow"], [("timeout", "too slow")])
    assert cache.get("bad", lambda: stored(3.0))[1][0] == 3.0
    # An error of the run is not one of the medium.
    assert waiting_for(cache, "broken", break_down) == (["the shard is gone"], [2.0])
    # What is not kept is made by each for itself.
    cache.max_bytes = 10
    assert waiting_for(cache, "big", lambda: stored(1.0)) == ([1.0], [2.0])
    assert cache.counts["not_kept"] == 2
    assert files(cache) == {"good1", f"good{MAPPED_BYTES}", "bad", "broken"}


DYING = """
import os, sys, signal
from pathlib import Path
from data.media import array_file
from data.media.node_cache import NodeCache
import numpy as np
cache = NodeCache("run", 1 << 30, Path(sys.argv[1]))
cache.get("whole", lambda: ({}, np.ones(3)))
def make():
    if sys.argv[2] == "making":
        os.kill(os.getpid(), signal.SIGKILL)
    return {}, np.ones(3)
write = os.pwrite
def half(descriptor, content, offset):
    is_mark, is_array = offset == 0, offset > array_file.PREFIX.size
    if is_mark and sys.argv[2] == "marking" or is_array and sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, content, offset)
if sys.argv[2] != "making":
    array_file.os.pwrite = half
cache.get("lost", make)
"""


@pytest.mark.parametrize("moment", ["making", "writing", "marking"])
def test_a_killed_process_leaves_no_lock_and_no_half_array(tmp_path: Path, moment: str) -> None:
    cache = NodeCache("run", GENEROUS, tmp_path)
    died = subprocess.run([sys.executable, "-c", DYING, tmp_path, moment], timeout=START_SECONDS)
    assert died.returncode == -signal.SIGKILL
    assert cache.get("lost", lambda: stored(4.0))[1][0] == 4.0
    assert cache.get("whole", never)[1].tolist() == [1, 1, 1]
    assert files(cache) == {"lost", "whole"}
    cache.close()


def test_the_last_process_removes_the_folder_and_the_next_run_what_was_killed(
    tmp_path: Path,
) -> None:
    cache = NodeCache("earlier", GENEROUS, tmp_path)
    subprocess.run([sys.executable, "-c", DYING, tmp_path, "making"], timeout=START_SECONDS)
    base = cache._folder.path.parent
    assert {path.name for path in base.iterdir()} == {"lock", "earlier", "run"}
    other = NodeCache("later", GENEROUS, tmp_path)
    assert {path.name for path in base.iterdir()} == {"lock", "earlier", "later"}
    again = NodeCache("later", GENEROUS, tmp_path)
    other.close()
    other.close()
    assert again._folder.path.exists()
    again.close()
    cache.close()
    assert {path.name for path in base.iterdir()} == {"lock"}


def test_nothing_is_put_into_the_folder_of_another_user(tmp_path: Path) -> None:
    (tmp_path / f"zppo_mm-{os.getuid()}").mkdir(mode=0o755)
    (tmp_path / f"zppo_mm-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match=r"not a folder of this user alone, got mode 40777"):
        NodeFolder(tmp_path, "run")


def test_what_the_step_did_not_ask_for_makes_way_first(cache: NodeCache) -> None:
    # A file has 400 bytes of numbers and 128 in front of them; ten take 5,280.
    for number in range(10):
        cache.get(f"k{number}", lambda: stored(1.0))
    assert cache.num_bytes() == 5280
    cache.next_step()
    for number in (0, 1, 2, 3):
        cache.get(f"k{number}", never)
    cache.max_bytes = 5300
    assert cache.get("new", lambda: stored(2.0))[1][0] == 2.0
    # One more may fill nine tenths of the room, 4,770: two old ones make way.
    assert files(cache) == {*(f"k{n}" for n in (0, 1, 2, 3, 6, 7, 8, 9)), "new"}
    assert cache.num_bytes() == 9 * 528
    for number in range(10, 40):
        cache.get(f"k{number}", lambda: stored(1.0))
        assert sum(path.stat().st_size for path in cache._folder.path.iterdir()) <= 5300 + 32


def test_prefetch_takes_only_the_room_that_the_step_leaves(cache: NodeCache) -> None:
    for number in range(3):
        cache.get(f"old{number}", lambda: stored(1.0))
    cache.next_step()
    for number in range(4):
        cache.get(f"now{number}", lambda: stored(1.0))
    cache.max_bytes = 7 * 528
    assert cache.prefetch("now0", never)
    assert cache.prefetch("next0", lambda: stored(1.0))
    assert cache.prefetch("next1", lambda: stored(1.0))
    assert cache.prefetch("next2", lambda: stored(1.0))
    assert not cache.prefetch("next3", lambda: stored(1.0))
    now, coming = {f"now{number}" for number in range(4)}, {f"next{n}" for n in range(3)}
    assert files(cache) == now | coming
    assert cache.counts == {"opened": 11, "prefetched": 3, "not_kept": 1}
    # What a step still needs goes before what the next one will.
    cache.get("more", lambda: stored(1.0))
    assert now < files(cache)
    cache.next_step()
    kept = sorted(files(cache) & coming)
    assert kept
    cache.get(kept[0], never)


@needs_proc
def test_prefetch_waits_for_nobody_and_its_failure_stays_its_own(cache: NodeCache) -> None:
    def ask_meanwhile() -> Stored:
        assert cache.prefetch("key", never)
        return stored(1.0)

    assert cache.get("key", ask_meanwhile)[1][0] == 1.0
    results: list[float] = []
    thread = threading.Thread(
        target=lambda: results.append(float(cache.get("slow", lambda: stored(2.0))[1][0]))
    )

    def fail_while_asked() -> Stored:
        thread.start()
        while not is_waiting(cache, "slow"):
            pass
        raise MediaError("timeout", "too slow")

    with pytest.raises(MediaError, match="too slow"):
        cache.prefetch("slow", fail_while_asked)
    thread.join()
    assert results == [2.0]
    assert files(cache) == {"key", "slow"}


def test_a_full_machine_costs_the_sharing_alone(
    cache: NodeCache, caplog: pytest.LogCaptureFixture
) -> None:
    small = cache.get("small", lambda: stored(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # writing further is an OSError
        for _ in range(3):
            assert cache.get("big", lambda: stored(5.0, 4000))[1][0] == 5.0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert cache.counts == {"opened": 4, "not_kept": 3}
    [message] = [record.getMessage() for record in caplog.records]
    assert "give the machine more shared memory" in message
    assert files(cache) == {"small"}
    assert np.array_equal(cache.get("small", never)[1], small[1])


def test_a_folder_that_somebody_removed_costs_the_sharing_alone(cache: NodeCache) -> None:
    cache.get("key", lambda: stored(1.0))
    for path in cache._folder.path.iterdir():
        path.unlink()
    cache._folder.path.rmdir()
    assert cache.get("key", lambda: stored(2.0))[1][0] == 2.0
    assert cache.prefetch("next", never)
    assert cache.num_bytes() == 0
    assert cache.counts["not_kept"] == 1


def test_a_folder_that_was_removed_with_all_others_is_left_in_peace(
    cache: NodeCache, caplog: pytest.LogCaptureFixture
) -> None:
    # systemd does so when a user logs out.
    cache.get("key", lambda: stored(1.0))
    shutil.rmtree(cache._folder.path.parent)
    assert cache.get("key", lambda: stored(2.0))[1][0] == 2.0
    [message] = [record.getMessage() for record in caplog.records]
    assert "RemoveIPC" in message
    cache.close()
    assert not cache._folder.path.parent.exists()


def test_a_forked_process_holds_no_lock(tmp_path: Path) -> None:
    cache = NodeCache("run", GENEROUS, tmp_path)
    lock = cache._folder.path / "lock"
    reading, writing = os.pipe()
    with locked(lock):
        child = os.fork()
        if child == 0:  # lives until the test is done
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        descriptor = os.open(lock, os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        cache.close()
        assert not cache._folder.path.exists()
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)


def test_prefetch_keeps_what_was_opened_long_ago(cache: NodeCache) -> None:
    for name in ("a", "b", "c"):
        cache.get(name, lambda: stored(1.0))
    cache.next_step()
    cache.max_bytes = 4 * 528
    assert cache.prefetch("a", never)
    assert cache.prefetch("new0", lambda: stored(1.0))
    assert cache.prefetch("new1", lambda: stored(1.0))
    assert {"a", "new0", "new1"} <= files(cache)
    cache.next_step()
    cache.get("a", never)


def test_no_more_than_half_of_the_free_memory_is_taken(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    cache = NodeCache("run", 1 << 60, tmp_path)
    assert cache.max_bytes < 0.6 * free.f_bavail * free.f_frsize
    cache.close()

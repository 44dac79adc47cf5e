"""Arrays that a disk keeps for all processes of a machine: whole or not at all, within the limit,
and never a reason for a run to end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data.errors import MediaError
from data.media import disk_cache
from data.media.array_file import MAPPED_BYTES, Stored
from data.media.disk_cache import ENDING, LOCK, PART, STALE_SECONDS, DiskCache

GENEROUS = 1 << 30
PATIENT = 120.0  # seconds of waiting and of a process on a busy machine
FILE_BYTES = 128 + 400  # of `stored`: prefix and header, then a hundred numbers


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path, GENEROUS, PATIENT)


def stored(number: float, count: int = 100) -> Stored:
    return {"number": number}, np.full(count, number, np.float32)


def never() -> Stored:
    raise AssertionError("made although it is there")


def names(folder: Path) -> set[str]:
    return {path.name.removesuffix(ENDING) for path in folder.iterdir()} - {LOCK}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != LOCK)


@pytest.mark.parametrize("count", [0, 100, MAPPED_BYTES], ids=["empty", "small", "large"])
def test_another_process_and_a_later_run_find_the_same(tmp_path: Path, count: int) -> None:
    array = np.arange(count, dtype=np.uint8).reshape(-1, 10 if count == 100 else 1)
    header = {"timestamps": (0.1 + 0.2, 1 / 3), "name": "\udcff é"}
    caches = [DiskCache(tmp_path, GENEROUS, PATIENT) for _ in range(3)]
    for each, make in zip(caches, (lambda: (header, array), never, never), strict=True):
        found_header, found = each.get("key", make)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
        assert list(found_header["timestamps"]) == list(header["timestamps"])
    assert [dict(each.counts) for each in caches] == [{"misses": 1}, {"hits": 1}, {"hits": 1}]
    assert caches[0].num_bytes() == size(tmp_path)
    assert names(tmp_path) == {"key"}


def test_many_threads_and_caches_make_each_once(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path, GENEROUS, PATIENT) for _ in range(2)]
    at_once = threading.Barrier(8)
    wrong: list[float] = []

    def ask(cache: DiskCache) -> None:
        at_once.wait()
        for number in range(10):
            _, array = cache.get(f"k{number}", partial(stored, float(number)))
            if array[0] != number:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(caches[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum((each.counts for each in caches), Counter()) == {"misses": 10, "hits": 70}
    assert caches[0].num_bytes() == size(tmp_path)


def test_a_failure_is_not_kept(cache: DiskCache, tmp_path: Path) -> None:
    def fail() -> Stored:
        raise MediaError("timeout", "too slow")

    with pytest.raises(MediaError, match="too slow"):
        cache.get("key", fail)
    assert names(tmp_path) == set()
    assert cache.get("key", lambda: stored(3.0))[1][0] == 3.0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="sees waiting by /proc")
def test_who_waits_for_a_failure_tries_and_keeps_it(cache: DiskCache, tmp_path: Path) -> None:
    waiting = threading.Thread(target=cache.get, args=("key", lambda: stored(2.0)))

    def fail_while_asked() -> Stored:
        waiting.start()
        part = os.path.realpath(tmp_path / f"key{PART}")
        opened = 1
        while opened < 2:
            links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            opened = sum(os.path.realpath(link) == part for link in links)
        raise MediaError("timeout", "too slow")

    with pytest.raises(MediaError, match="too slow"):
        cache.get("key", fail_while_asked)
    waiting.join(PATIENT)
    assert cache.get("key", never)[1][0] == 2.0
    assert cache.counts == {"misses": 1, "hits": 1}


DYING = """
import os, sys, signal
from pathlib import Path
import numpy as np
from data.media import array_file
from data.media.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 1 << 30, 120.0)
cache.get("whole", lambda: ({}, np.ones(3)))
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def make():
    if sys.argv[2] == "making":
        die()
    return {}, np.ones(1000)
write = os.pwrite
def half(descriptor, content, offset):
    if len(content) == 8000:
        write(descriptor, content[:4000], offset)
        die()
    return write(descriptor, content, offset)
if sys.argv[2] == "writing":
    array_file.os.pwrite = half
if sys.argv[2] == "naming":
    os.rename = lambda *names: die()
cache.get("lost", make)
"""


@pytest.mark.parametrize("moment", ["making", "writing", "naming"])
def test_a_killed_process_leaves_no_lock_and_no_half_file(
    cache: DiskCache, tmp_path: Path, moment: str
) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, tmp_path, moment], timeout=PATIENT)
    assert died.returncode == -signal.SIGKILL
    assert names(tmp_path) == {"whole", f"lost{PART}"}
    # Who needs room for something else removes it.
    other = DiskCache(tmp_path, FILE_BYTES + 10, PATIENT)
    other.get("a", lambda: stored(4.0))
    assert names(tmp_path) == {"a"}
    assert other.num_bytes() == size(tmp_path)
    # Who asks for the same goes on with it.
    subprocess.run([sys.executable, "-c", DYING, tmp_path, moment], timeout=PATIENT)
    assert cache.get("lost", lambda: stored(4.0))[1][0] == 4.0
    assert cache.get("lost", never)[1].tolist() == [4.0] * 100
    assert names(tmp_path) == {"whole", "a", "lost"}


def _cut(content: bytes) -> bytes:
    return content[:-1]


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda content: (
        content[:at] + bytes([content[at] ^ 1]) + content[at % len(content) + 1 :]
    )


def _shape(shape: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(b'"shape": [100]', b'"shape": ' + shape)


@pytest.mark.parametrize(
    "damage",
    [_cut, lambda _: b"", lambda _: b"x" * 5000, _flip(-2), _flip(300), _flip(60)]
    + [_shape(each) for each in (b"[-10]", b"[1.5]", b"[10] ", b"[9e9]", b"null ", b'"100"')],
)
def test_a_damaged_file_is_made_again(
    cache: DiskCache, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache.get("key", lambda: stored(1.0))
    path = tmp_path / f"key{ENDING}"
    content = path.read_bytes()
    damaged = damage(content)
    assert damaged != content
    path.write_bytes(damaged)
    assert cache.get("key", lambda: stored(2.0))[1].tolist() == [2.0] * 100
    assert cache.get("key", never)[1].tolist() == [2.0] * 100
    assert cache.counts == {"misses": 2, "damaged": 1, "hits": 1}


def test_other_times_or_numbers_of_a_right_length_are_damage_too(
    cache: DiskCache, tmp_path: Path
) -> None:
    cache.get("key", lambda: stored(1.0))
    path = tmp_path / f"key{ENDING}"
    changed = path.read_bytes().replace(b'"number": 1.0', b'"number": 1.5')
    path.write_bytes(changed)
    assert cache.get("key", lambda: stored(2.0))[0] == {"number": 2.0}
    assert cache.counts["damaged"] == 1


def test_a_full_disk_costs_what_it_cannot_keep(
    cache: DiskCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.get("before", lambda: stored(1.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for number in range(3):
            assert cache.get(f"k{number}", lambda: stored(5.0, 1000))[1][0] == 5.0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    cache.get("before", never)
    assert names(tmp_path) == {"before"}
    assert cache.counts == {"misses": 4, "not_kept": 3, "hits": 1}
    assert [os.strerror(errno.EFBIG) in record.message for record in caplog.records] == [True]
    cache.get("k0", lambda: stored(1.0))
    cache.get("k0", never)


def test_a_part_of_the_disk_is_left_to_others(
    cache: DiskCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(disk_cache, "FREE_FRACTION", 1.0)
    assert cache.get("key", lambda: stored(1.0))[1][0] == 1.0
    assert names(tmp_path) == set()
    assert cache.counts == {"misses": 1, "not_kept": 1}
    assert "cannot keep what was made, got less than 100% of the disk free" in caplog.text


def test_who_is_stopped_while_it_makes_something_holds_up_nobody_for_long(tmp_path: Path) -> None:
    impatient = DiskCache(tmp_path, GENEROUS, 0.0)
    with (tmp_path / f"key{PART}").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert impatient.get("key", lambda: stored(1.0))[1][0] == 1.0
        assert impatient.get("other", lambda: stored(1.0))[1][0] == 1.0
    assert impatient.counts == {"misses": 2, "not_kept": 1}
    assert names(tmp_path) == {f"key{PART}", "other"}


def test_a_folder_that_somebody_removed_costs_the_cache_alone(
    cache: DiskCache, tmp_path: Path
) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()
    assert cache.get("key", lambda: stored(1.0))[1][0] == 1.0
    assert cache.counts == {"misses": 1, "not_kept": 1}
    assert cache.num_bytes() == 0


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x" * 10_000)
    (tmp_path / "folder").mkdir()
    cache = DiskCache(tmp_path, 2 * FILE_BYTES, PATIENT)
    for number in range(9, -1, -1):
        cache.get(f"k{number}", lambda: stored(1.0))
    assert {"thesis.tex", "folder"} < names(tmp_path)
    assert cache.counts["evictions"] > 0


def test_the_limit_holds_whatever_comes(tmp_path: Path) -> None:
    """Random sizes and keys, and a limit that is lowered."""
    draw = random.Random(0)
    cache = DiskCache(tmp_path, 20_000, PATIENT)
    for number in range(300):
        if number == 200:
            cache = DiskCache(tmp_path, 5_000, PATIENT)
        count = draw.randrange(2000)
        _, array = cache.get(f"{draw.randrange(50):02d}", partial(stored, 1.0, count))
        assert (array == 1.0).all()
        if number < 200:
            assert size(tmp_path) <= 20_000
    assert size(tmp_path) <= 5_000
    assert cache.num_bytes() == size(tmp_path)
    assert cache.get("too big", lambda: stored(1.0, 2000))[1][0] == 1.0
    assert cache.counts["not_kept"] > 0


def test_every_epoch_finds_the_part_that_fits(tmp_path: Path) -> None:
    """20 clips, room for 10, each epoch in another order: by the least recent use about 3 were
    found.
    """
    draw = random.Random(1)
    cache = DiskCache(tmp_path, 10 * FILE_BYTES, PATIENT)
    clips = [f"{number:02d}" for number in range(20)]
    hits = []
    for _ in range(6):
        before = cache.counts["hits"]
        for clip in draw.sample(clips, len(clips)):
            cache.get(clip, lambda: stored(1.0))
        hits.append(cache.counts["hits"] - before)
    assert hits[0] == 0
    assert min(hits[2:]) >= 9


def test_what_nobody_asked_for_in_a_week_makes_way_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 4 * FILE_BYTES, PATIENT)
    for name in "abcd":
        cache.get(name, lambda: stored(1.0))
    for name, days in (("a", 8), ("b", 9)):
        path = tmp_path / f"{name}{ENDING}"
        asked = path.stat().st_mtime - STALE_SECONDS * days / 7
        os.utime(path, (asked, asked))
    cache.get("a", never)
    cache.get("z", lambda: stored(1.0))
    assert names(tmp_path) == {"a", "c", "d", "z"}
    # Now none is, and the last name goes.
    cache.get("y", lambda: stored(1.0))
    assert names(tmp_path) == {"a", "c", "d", "y"}


def test_refused_keys_do_not_look_through_the_folder_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path, 2 * FILE_BYTES, PATIENT)
    for name in "ab":
        cache.get(name, lambda: stored(1.0))
    scans = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scandir(path))
    for number in range(20):
        cache.get(f"c{number}", lambda: stored(1.0))
    assert len(scans) == 1
    assert cache.counts["not_kept"] == 20
    # One that has room ends what was learnt from those that had none.
    cache.get("aa", lambda: stored(1.0))
    cache.get("c0", lambda: stored(1.0))
    assert len(scans) == 3
    assert names(tmp_path) == {"a", "aa"}
    # Room that others make is found.
    (tmp_path / f"a{ENDING}").unlink()
    monkeypatch.setattr(disk_cache, "REFUSALS_PER_LOOK", 1)
    cache.get("c1", lambda: stored(1.0))
    cache.get("c1", never)


def test_a_lost_count_is_taken_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3 * FILE_BYTES, PATIENT)
    cache.get("a", lambda: stored(1.0))
    for content in (b"", b"no number"):
        (tmp_path / LOCK).write_bytes(content)
        cache.get(f"b{len(content)}", lambda: stored(1.0))
        assert cache.num_bytes() == size(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        DiskCache(tmp_path / "file" / "folder", GENEROUS, PATIENT)

"""A process that hangs is found and says where; one that moves, or waits with a limit, is
left alone.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from torch.distributed import HashStore

from zppo_mm.parallel.failures import RANK_FAILURE_EXIT_CODE
from zppo_mm.parallel.hang_watch import HangWatch
from zppo_mm.parallel.liveness_barrier import FAILURE
from zppo_mm.run.hangs import BOUNDED_WAITS

LIMIT_SECONDS = 1.0
LONG_SECONDS = 30.0
"""Far more than the watch needs; the tests end as soon as it has acted."""


class Ending:
    """Takes the place of the process's end."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.called = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.called.set()


@pytest.fixture(autouse=True)
def _quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("CHECK", 0.05), ("WRITE", 0.2), ("LEAVE", 0.3)):
        monkeypatch.setattr(f"zppo_mm.parallel.hang_watch.{name}_SECONDS", seconds)


@contextmanager
def watching(
    path: Path,
    store: HashStore | None = None,
    bounded_waits: tuple[Callable[..., object], ...] = (),
    is_computing_progress: bool = True,
    limit_seconds: float = LIMIT_SECONDS,
) -> Iterator[Ending]:
    ending = Ending()
    watch = HangWatch(
        store,
        "rank 7",
        path,
        limit_seconds,
        bounded_waits=bounded_waits,
        is_computing_progress=is_computing_progress,
        end=ending,
    )
    with closing(watch):
        yield ending


def stand_still(ending: Ending, seconds: float = LONG_SECONDS) -> bool:
    """Wait at one place in the program; returns whether the process would have been ended."""
    return ending.called.wait(seconds)


def test_a_hang_is_written_reported_and_ended(tmp_path: Path) -> None:
    path, store = tmp_path / "stacks" / "student_00007.txt", HashStore()
    with watching(path, store) as ending:
        assert stand_still(ending)
    assert ending.codes == [RANK_FAILURE_EXIT_CODE]
    text = path.read_text(encoding="utf-8")
    assert "rank 7: hangs, got no progress for 1 s (parallel.hang_minutes) in " in text
    assert "in stand_still" in text
    assert "threading.py" in text
    assert store.get(FAILURE).decode().startswith("rank 7: hangs")


def compute(ending: Ending, seconds: float) -> bool:
    """Compute at one point, the only one where other threads see this one; returns whether the
    process would have been ended.
    """
    over: list[bool] = []
    timer = threading.Timer(seconds, over.append, (True,))
    timer.start()
    while not (over or ending.codes):
        pass
    timer.cancel()
    return bool(ending.codes)


def test_computing_is_progress_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "stacks" / "student_00007.txt"
    with watching(path) as ending:
        assert not compute(ending, 2 * LIMIT_SECONDS)
    assert not path.parent.exists()
    with watching(path, is_computing_progress=False) as ending:
        assert compute(ending, LONG_SECONDS)


def test_a_thread_that_moves_on_is_left_alone(tmp_path: Path) -> None:
    deadline = time.monotonic() + 2 * LIMIT_SECONDS
    with watching(tmp_path / "rank") as ending:
        while time.monotonic() < deadline:
            stand_still(ending, LIMIT_SECONDS / 4)
            time.sleep(LIMIT_SECONDS / 4)
    assert ending.codes == []


def test_a_wait_with_a_limit_of_its_own_is_left_alone(tmp_path: Path) -> None:
    with watching(tmp_path / "rank", bounded_waits=(stand_still,)) as ending:
        assert not stand_still(ending, 2 * LIMIT_SECONDS)
    with watching(tmp_path / "rank") as ending:
        assert stand_still(ending)


def test_the_others_write_their_stacks_and_end_if_they_do_not_by_themselves(
    tmp_path: Path,
) -> None:
    path, store = tmp_path / "rank", HashStore()
    with watching(path, store, limit_seconds=LONG_SECONDS) as ending:
        store.set("hang", "rank 3: hangs")
        while not path.exists() or "Thread" not in path.read_text(encoding="utf-8"):
            time.sleep(0.01)
        assert ending.codes == []
        store.set(FAILURE, "rank 3: hangs")
        assert stand_still(ending)
    assert ending.codes == [RANK_FAILURE_EXIT_CODE]
    text = path.read_text(encoding="utf-8")
    assert "rank 3: hangs" in text
    assert text.count("in stand_still") == 1


def test_what_the_run_does_not_take_for_a_hang_are_functions_that_wait() -> None:
    names = [each.__qualname__ for each in BOUNDED_WAITS]
    assert len(set(names)) == len(names)
    for function in BOUNDED_WAITS:
        assert inspect.isfunction(function)

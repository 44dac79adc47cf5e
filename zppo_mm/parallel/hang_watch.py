"""Finds a process of the run that hangs, and has every process write where it is before they end.

A process hangs when its main thread has been in one call of the program for too long. No phase of a
run has to report progress for that: whatever works through layers, tokens, files or questions calls
again. A single call may read or write a large file, which is progress as well, or compute for long
on a CPU; on a GPU it does not, and there a thread that waits for the device may be busy. Only waits
stay at one place while all is well; each of them has a limit of its own, so a process in one of
them is left to that: collectives, the barrier of the ranks, answers of servers and of worker
processes, files that another process makes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from zppo_mm.parallel.failures import RANK_FAILURE_EXIT_CODE
from zppo_mm.parallel.liveness_barrier import FAILURE, Store
from zppo_mm.parallel.thread_progress import ThreadProgress

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
WRITE_SECONDS = 5.0
"""From the news that a process hangs to the end: every other process writes its stacks in it."""
LEAVE_SECONDS = 30.0
"""For a main thread to end by itself after another process failed."""
_HANG = "hang"


class HangWatch:
    """Watches this process's main thread from a thread of its own.

    Args:
        store: Of the run's processes, by which they learn of one that hangs; `None` if this is the
            only one.
        name: Of this process, in messages.
        path: What the stacks of all its threads are appended to.
        limit_seconds: Time at one place after which the process hangs.
        bounded_waits: Functions that wait with a limit of their own, like collectives.
        is_computing_progress: Whether a thread that uses the processor does not hang.
        end: Ends the process with an exit code, from any thread.
    """

    def __init__(
        self,
        store: Store | None,
        name: str,
        path: Path,
        limit_seconds: float,
        *,
        bounded_waits: Iterable[Callable[..., object]] = (),
        is_computing_progress: bool = True,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._store = store
        self._name = name
        self._path = path
        self._limit_seconds = limit_seconds
        self._end_process = end
        self._progress = ThreadProgress(
            threading.main_thread(), bounded_waits, is_computing_progress=is_computing_progress
        )
        self._seconds_there = 0.0
        self._seconds_lost = 0.0
        self._has_written = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(CHECK_SECONDS):
            # A library that lets no other thread of Python run stops this one too: the process is
            # then missed by its heartbeat, and its stacks are in its output.
            faulthandler.dump_traceback_later(self._limit_seconds + 2 * CHECK_SECONDS, file=2)
            now = time.monotonic()
            # A process that was stopped for a while, by a debugger or its scheduler, did not hang.
            seconds, last = min(now - last, 2 * CHECK_SECONDS), now
            has_moved = self._progress.has_moved()
            self._seconds_there = 0.0 if has_moved else self._seconds_there + seconds
            if self._seconds_there >= self._limit_seconds:
                self._report(self._progress.where)
                return
            if self._is_another_lost(seconds):
                return

    def _report(self, where: str) -> None:
        """Report to the other processes, and end this one."""
        problem = (
            f"{self._name}: hangs, got no progress for {self._limit_seconds:g} s "
            f"(parallel.hang_minutes) in {where}"
        )
        self._write(problem)
        if self._store is not None:
            # Without a store the others know already.
            with contextlib.suppress(RuntimeError):
                self._store.set(_HANG, problem)
                time.sleep(WRITE_SECONDS)
                self._store.set(FAILURE, problem)
        self._end(problem)

    def _is_another_lost(self, seconds: float) -> bool:
        """Act on the failure of another process; returns whether this one was ended for it."""
        if self._store is None:
            return False
        problem = "the process with the run's store has ended"
        try:
            if not self._has_written and self._store.check([_HANG]):
                self._write(self._store.get(_HANG).decode())
            is_lost = self._store.check([FAILURE])
            if is_lost:
                problem = self._store.get(FAILURE).decode()
        except RuntimeError:
            is_lost = True
        self._seconds_lost += seconds if is_lost else 0.0
        if self._seconds_lost < LEAVE_SECONDS:
            return False
        self._write(problem)
        self._end(f"{self._name}: did not end within {LEAVE_SECONDS:g} s after {problem}")
        return True

    def _write(self, why: str) -> None:
        self._has_written = True
        # A disk may be what the process hangs on.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")
                file.flush()
                faulthandler.dump_traceback(file)

    def _end(self, problem: str) -> None:
        # In a thread of its own, because a terminal or a pipe may be what the process hangs in.
        text = f"parallel: {problem}; see {self._path.parent}, then start the run again to resume"
        writer = threading.Thread(target=logger.error, args=("%s", text), daemon=True)
        writer.start()
        writer.join(CHECK_SECONDS)
        self._end_process(RANK_FAILURE_EXIT_CODE)

"""Killable worker processes for comparisons that may never end.

A worker is a fresh interpreter that is spoken to over pipes: nothing is forked in our process, no
signal handler is set and no thread is needed, so grading works in any thread beside torch and NCCL.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Literal

from zppo_mm.interpreters import start_interpreter

logger = logging.getLogger(__name__)

Outcome = Literal["equal", "different", "timeout", "error"]

# A cold interpreter that imports sympy from a slow disk on a loaded machine.
START_TIMEOUT_SECONDS = 180.0
# What takes longer is tried again after everything else, so that a burst of such answers holds up
# no other.
TRY_SECONDS = (0.2, 1.0)
_SERVER = "zppo_mm.rewards.grading_process"


class GradingPool:
    """Compares pairs of answers in worker processes, each comparison and all of a call within hard
    limits.

    Workers start with the first comparison and stay. A comparison that runs into its limit ends a
    child of the worker, which has another one ready. One limit counts processor time, so that a
    loaded machine makes no answer fail; the other the clock, so that no call takes longer.

    Args:
        timeout_seconds: Processor time of one comparison.
        num_workers: Most worker processes.
        budget_seconds: Wall-clock time of a call, from when the first worker is there. What is open
            then is a `timeout`.

    Attributes:
        num_timeouts: Comparisons ended by a limit so far.
        num_errors: Comparisons in which the library failed or the worker died.
    """

    def __init__(
        self, timeout_seconds: float, num_workers: int, budget_seconds: float = 60.0
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.num_workers = num_workers
        self.budget_seconds = budget_seconds
        self.num_timeouts = 0
        self.num_errors = 0
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def compare_all(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Return one outcome per (answer, reference) pair, in order.

        Raises:
            RuntimeError: If a worker cannot be started.
        """
        with self._lock, selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            call = _Call(
                pairs, deque((index, self._seconds_after(0.0)) for index in range(len(pairs)))
            )
            while call.waiting or any(worker.job is not None for worker in self._workers):
                if call.deadline is None and not all(
                    worker.is_starting for worker in self._workers
                ):
                    call.deadline = time.monotonic() + self.budget_seconds
                if call.deadline is not None and call.deadline <= time.monotonic():
                    self._give_up(call, selector)
                    break
                self._assign(call, selector)
                deadlines = [
                    worker.start_deadline for worker in self._workers if worker.is_starting
                ]
                remaining = (
                    min([*deadlines, *([call.deadline] if call.deadline is not None else [])])
                    - time.monotonic()
                )
                for key, _ in selector.select(max(0.0, remaining)):
                    self._receive(key.data, call, selector)
                for worker in [
                    w
                    for w in self._workers
                    if w.is_starting and w.start_deadline <= time.monotonic()
                ]:
                    self._fail_start(
                        worker, f"did not answer within {START_TIMEOUT_SECONDS:.0f} s", selector
                    )
        return [call.outcomes[index] for index in range(len(pairs))]

    def close(self) -> None:
        """End the workers; a later comparison starts new ones."""
        with self._lock:
            _kill_all(self._workers)

    def _assign(self, call: _Call, selector: selectors.BaseSelector) -> None:
        for worker in list(self._workers):
            if call.waiting and worker.is_idle:
                index, seconds = call.waiting[0]
                if worker.send(_Job(index, call.pairs[index], seconds)):
                    call.waiting.popleft()
                else:  # it died while nobody looked; the pair goes to another one
                    self._drop(worker, selector)
        while (
            sum(worker.is_starting for worker in self._workers) < len(call.waiting)
            and len(self._workers) < self.num_workers
        ):
            self._start(selector)

    def _seconds_after(self, tried: float) -> float:
        """Return the processor time of the next try."""
        return min([seconds for seconds in TRY_SECONDS if seconds > tried] + [self.timeout_seconds])

    def _start(self, selector: selectors.BaseSelector) -> None:
        worker = _Worker()
        self._workers.append(worker)
        selector.register(worker.replies, selectors.EVENT_READ, worker)

    def _receive(self, worker: _Worker, call: _Call, selector: selectors.BaseSelector) -> None:
        line = worker.read_line()
        if line is None:
            return
        if line == b"":
            if worker.is_starting:
                self._fail_start(worker, "ended", selector)
            if worker.job is not None:
                self._count_error(
                    call, worker.job, f"the worker ended with code {worker.process.wait()}"
                )
            self._drop(worker, selector)
            return
        reply = json.loads(line)
        if worker.is_starting:
            worker.is_starting = False
            return
        job = worker.job
        assert job is not None
        worker.job = None
        if "equal" in reply:
            call.outcomes[job.index] = "equal" if reply["equal"] else "different"
        elif "error" in reply:
            self._count_error(call, job, reply["error"])
        elif job.seconds < self.timeout_seconds:
            call.waiting.append((job.index, self._seconds_after(job.seconds)))
        else:
            self._count_timeout(call, job.index, f"{self.timeout_seconds:g} s of processor time")

    def _give_up(self, call: _Call, selector: selectors.BaseSelector) -> None:
        """End a call whose time is up; workers that it kept busy are replaced, which the next call
        need not wait for.
        """
        for worker in [worker for worker in self._workers if worker.job is not None]:
            assert worker.job is not None
            self._count_timeout(
                call, worker.job.index, f"the {self.budget_seconds:g} s of its call"
            )
            self._drop(worker, selector)
            self._start(selector)
        for index, _ in call.waiting:
            self._count_timeout(call, index, f"the {self.budget_seconds:g} s of its call")

    def _count_timeout(self, call: _Call, index: int, limit: str) -> None:
        self.num_timeouts += 1
        call.outcomes[index] = "timeout"
        logger.warning(
            "grading: no verdict within %s, the answer is left out; answer %r",
            limit,
            call.pairs[index][0][:80],
        )

    def _count_error(self, call: _Call, job: _Job, message: str) -> None:
        self.num_errors += 1
        call.outcomes[job.index] = "error"
        logger.warning("grading: %s, the answer is left out; answer %r", message, job.pair[0][:80])

    def _drop(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(worker.replies)
        self._workers.remove(worker)
        worker.kill()

    def _fail_start(self, worker: _Worker, what: str, selector: selectors.BaseSelector) -> None:
        worker.kill_processes()
        tail = worker.read_errors()
        self._drop(worker, selector)
        raise RuntimeError(
            f"GradingPool: a grading worker {what} before it was ready, got {tail!r}, expected "
            f"python -m {_SERVER} to run; check that math-verify is installed"
        )


@dataclass(frozen=True, slots=True)
class _Job:
    index: int
    pair: tuple[str, str]
    seconds: float


class _Call:
    """The pairs of one call: what waits, with the processor time that it may take, and what is
    known.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], waiting: deque[tuple[int, float]]) -> None:
        self.pairs = pairs
        self.waiting = waiting
        self.outcomes: dict[int, Outcome] = {}
        self.deadline: float | None = None


class _Worker:
    """One process, its pipes and what it is doing."""

    def __init__(self) -> None:
        # Lives as long as the worker.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = start_interpreter(
            _SERVER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # An interrupt from the keyboard is ours to handle, and the child dies with its worker.
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.replies = self.process.stdout
        self.is_starting = True
        self.job: _Job | None = None
        self.start_deadline = time.monotonic() + START_TIMEOUT_SECONDS
        self._buffer = b""

    @property
    def is_idle(self) -> bool:
        return not self.is_starting and self.job is None

    def send(self, job: _Job) -> bool:
        """Hand over a job; false if the process is gone."""
        assert self.process.stdin is not None
        request = {"parsed": job.pair[0], "gold": job.pair[1], "seconds": job.seconds}
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        self.job = job
        return True

    def read_line(self) -> bytes | None:
        """Return the next complete reply, empty if the process has ended, `None` if the reply is
        not whole yet.
        """
        data = os.read(self.replies.fileno(), 65536)
        if not data:
            return b""
        self._buffer += data
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        return line

    def read_errors(self) -> str:
        """Return the end of what the process wrote to its standard error."""
        self._errors.seek(0)
        return self._errors.read()[-500:].decode(errors="replace").strip()

    def kill_processes(self) -> None:
        """End the process and its child, which share a process group of their own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill(self) -> None:
        self.kill_processes()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    # An unsent request of a worker that is gone; its pair has been given to
                    # another.
                    continue


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()

"""Killable worker processes for comparisons that may never end.

A worker is a fresh interpreter that is spoken to over pipes: nothing is forked, no signal handler is set and no thread is needed in
our process, so grading works in any thread beside torch and NCCL.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
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
# The worker's own alarm is the second line of defence: it rings only if we did not kill the worker.
ALARM_FACTOR, ALARM_MARGIN_SECONDS = 2.0, 5.0
_SERVER = "zppo_mm.rewards.grading_process"


class GradingPool:
    """Compares pairs of answers in worker processes, each comparison within a hard limit.

    Workers start with the first comparison, stay, and are replaced after they were killed.

    Args:
        timeout_seconds: Wall-clock limit of one comparison.
        num_workers: Most worker processes.

    Attributes:
        num_timeouts: Comparisons ended by the limit so far.
        num_errors: Comparisons in which the library failed or the worker died.
    """

    def __init__(self, timeout_seconds: float, num_workers: int) -> None:
        self.timeout_seconds = timeout_seconds
        self.num_workers = num_workers
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
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(pairs)))
        with self._lock, selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            while len(outcomes) < len(pairs):
                self._assign(waiting, pairs, selector)
                remaining = min(worker.deadline for worker in self._workers if not worker.is_idle) - time.monotonic()
                for key, _ in selector.select(max(0.0, remaining)):
                    self._receive(key.data, outcomes, selector)
                for worker in [w for w in self._workers if not w.is_idle and w.deadline <= time.monotonic()]:
                    self._expire(worker, outcomes, selector)
        return [outcomes[index] for index in range(len(pairs))]

    def close(self) -> None:
        """End the workers; a later comparison starts new ones."""
        with self._lock:
            _kill_all(self._workers)

    def _assign(self, waiting: deque[int], pairs: Sequence[tuple[str, str]], selector: selectors.BaseSelector) -> None:
        for worker in list(self._workers):
            if waiting and worker.is_idle:
                if worker.send(waiting[0], pairs[waiting[0]], self.timeout_seconds):
                    waiting.popleft()
                else:  # it died while nobody looked; the pair goes to another one
                    self._drop(worker, selector)
        while sum(worker.is_starting for worker in self._workers) < len(waiting) and len(self._workers) < self.num_workers:
            worker = _Worker(self.timeout_seconds * ALARM_FACTOR + ALARM_MARGIN_SECONDS)
            self._workers.append(worker)
            selector.register(worker.replies, selectors.EVENT_READ, worker)

    def _receive(self, worker: _Worker, outcomes: dict[int, Outcome], selector: selectors.BaseSelector) -> None:
        line = worker.read_line()
        if line is None:
            return
        if line == b"":
            if worker.is_starting:
                self._fail_start(worker, "ended", selector)
            if worker.job is not None:
                self._count_error(worker, outcomes, f"the worker ended with code {worker.process.wait()}")
            self._drop(worker, selector)
            return
        reply = json.loads(line)
        if worker.is_starting:
            worker.is_starting = False
            return
        if "error" in reply:
            self._count_error(worker, outcomes, reply["error"])
        else:
            assert worker.job is not None
            outcomes[worker.job.index] = "equal" if reply["equal"] else "different"
        worker.job = None

    def _expire(self, worker: _Worker, outcomes: dict[int, Outcome], selector: selectors.BaseSelector) -> None:
        if worker.is_starting:
            self._fail_start(worker, f"did not answer within {START_TIMEOUT_SECONDS:.0f} s", selector)
        assert worker.job is not None
        self.num_timeouts += 1
        outcomes[worker.job.index] = "timeout"
        logger.warning(
            "grading: no verdict within %.1f s, the worker is replaced; answer %r", self.timeout_seconds, worker.job.pair[0][:80]
        )
        self._drop(worker, selector)

    def _count_error(self, worker: _Worker, outcomes: dict[int, Outcome], message: str) -> None:
        assert worker.job is not None
        self.num_errors += 1
        outcomes[worker.job.index] = "error"
        logger.warning("grading: %s; answer %r", message, worker.job.pair[0][:80])

    def _drop(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(worker.replies)
        self._workers.remove(worker)
        worker.kill()

    def _fail_start(self, worker: _Worker, what: str, selector: selectors.BaseSelector) -> None:
        worker.process.kill()
        worker.process.wait()
        tail = worker.read_errors()
        self._drop(worker, selector)
        raise RuntimeError(
            f"GradingPool: a grading worker {what} before it was ready, got {tail!r}, expected python -m {_SERVER} to run; "
            "check that math-verify is installed"
        )


@dataclass(frozen=True, slots=True)
class _Job:
    index: int
    pair: tuple[str, str]


class _Worker:
    """One process, its pipes and what it is doing."""

    def __init__(self, alarm_seconds: float) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.process = start_interpreter(
            _SERVER,
            str(alarm_seconds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # an interrupt from the keyboard is ours to handle
        )
        assert self.process.stdout is not None
        self.replies = self.process.stdout
        self.is_starting = True
        self.job: _Job | None = None
        self.deadline = time.monotonic() + START_TIMEOUT_SECONDS
        self._buffer = b""

    @property
    def is_idle(self) -> bool:
        return not self.is_starting and self.job is None

    def send(self, index: int, pair: tuple[str, str], timeout_seconds: float) -> bool:
        """Hand over a job and start its clock; false if the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"parsed": pair[0], "gold": pair[1]}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        self.job = _Job(index, pair)
        self.deadline = time.monotonic() + timeout_seconds
        return True

    def read_line(self) -> bytes | None:
        """Return the next complete reply, empty if the process has ended, `None` if the reply is not whole yet."""
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

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # an unsent request of a worker that is gone; its pair has been given to another


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()

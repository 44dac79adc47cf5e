"""Comparisons by algebra and reward functions, which may never end, in worker processes that can be
killed.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Literal

from data.worker import KillableWorker, Reply, WorkerDied, WorkerNotStarted

logger = logging.getLogger(__name__)

Outcome = Literal["equal", "different", "timeout", "error"]
Answer = Mapping[str, Any]
"""What a worker replied, or `timeout` or `error` with what happened."""

# What takes longer is tried again after everything else, so that a burst of such answers holds up
# no other.
TRY_SECONDS = (0.2, 1.0)
_ALGEBRA = "zppo_mm.rewards.grading_process"


class GradingPool:
    """Grades in worker processes, each request and all of a call within hard limits.

    Workers start with the first request and stay. A request that runs into its limit ends a
    child of the worker, which has another one ready. One limit counts processor time, so that a
    loaded machine makes no answer fail; the other the clock, so that no call takes longer.

    Args:
        timeout_seconds: Processor time of one request.
        num_workers: Most worker processes.
        budget_seconds: Wall-clock time of a call, from when the first worker is there. What is open
            then is a `timeout`.
        module: What the workers run, with `serve_forked`; by default comparisons by algebra.
        arguments: For its command line.

    Attributes:
        num_timeouts: Requests ended by a limit so far.
        num_errors: Requests in which the library failed or the worker died.
    """

    def __init__(
        self,
        timeout_seconds: float,
        num_workers: int,
        budget_seconds: float = 60.0,
        module: str = _ALGEBRA,
        arguments: Sequence[str] = (),
    ) -> None:
        self._command = (module, *arguments)
        self.timeout_seconds = timeout_seconds
        self.num_workers = num_workers
        self.budget_seconds = budget_seconds
        self.num_timeouts = 0
        self.num_errors = 0
        self._lock = threading.Lock()
        self._workers: list[KillableWorker] = []
        weakref.finalize(self, _kill_all, self._workers).atexit = False

    def compare_all(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Return one outcome per (answer, reference) pair, in order.

        Raises:
            RuntimeError: If a worker cannot be started.
        """
        try:
            answers = self.ask_all([{"parsed": parsed, "gold": gold} for parsed, gold in pairs])
        except WorkerNotStarted as error:
            raise RuntimeError(
                f"GradingPool: a grading worker {error} before it was ready, expected "
                f"python -m {_ALGEBRA} to run; check that math-verify is installed "
                "(standard error says more)"
            ) from error
        return [_outcome(*each) for each in zip(pairs, answers, strict=True)]

    def ask_all(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Return one answer per request, in order.

        Raises:
            WorkerNotStarted: A worker cannot be started.
        """
        tries = [seconds for seconds in TRY_SECONDS if seconds < self.timeout_seconds]
        call = _Call(requests, [*tries, self.timeout_seconds])
        with self._lock:
            try:
                while call.waiting or call.running:
                    self._workers[:] = [worker for worker in self._workers if worker.is_running()]
                    self._assign(call)
                    starting = [worker.ready for worker in self._workers if not worker.ready.done()]
                    patience = None if call.deadline is None else call.deadline - time.monotonic()
                    wait([*call.running, *starting], patience, FIRST_COMPLETED)
                    for reply in [reply for reply in call.running if reply.done()]:
                        self._take(call, reply, *call.running.pop(reply))
            finally:
                for worker, _, _ in call.running.values():  # only if it was interrupted
                    worker.kill()
        return [call.answers[index] for index in range(len(requests))]

    def start(self) -> None:
        """Start a first worker, and wait until it can work.

        Raises:
            WorkerNotStarted: It cannot; the message says why.
        """
        with self._lock:
            if not self._workers:
                self._workers.append(KillableWorker(*self._command))
            self._workers[0].ready.result()

    def close(self) -> None:
        """End the workers; a later request starts new ones."""
        with self._lock:
            for worker in self._workers:
                worker.close()
            self._workers.clear()

    def _assign(self, call: _Call) -> None:
        """Give waiting requests to idle workers, or give them up when the call's time is over."""
        busy = [worker for worker, _, _ in call.running.values()]
        missing = len(call.waiting) - (len(self._workers) - len(busy))
        for _ in range(min(self.num_workers - len(self._workers), missing)):
            self._workers.append(KillableWorker(*self._command))
        ready = [worker for worker in self._workers if _is_ready(worker)]
        if ready and call.deadline is None:
            call.deadline = time.monotonic() + self.budget_seconds
        if call.deadline is None:
            return
        if call.deadline <= time.monotonic():
            while call.waiting:
                self._count_timeout(call, call.waiting.popleft()[0], self._budget)
        for worker in [worker for worker in ready if worker not in busy][: len(call.waiting)]:
            index, attempt = call.waiting.popleft()
            request = {**call.requests[index], "seconds": call.limits[attempt]}
            reply = worker.submit(request, deadline=call.deadline)
            call.running[reply] = worker, index, attempt

    def _take(
        self, call: _Call, reply: Future[Reply], worker: KillableWorker, index: int, attempt: int
    ) -> None:
        """Note what came of a request, or let it wait for a longer try."""
        try:
            answer, _ = reply.result()
        except TimeoutError:
            # Started now, so that the next call need not wait for it.
            self._workers.append(KillableWorker(*self._command))
            self._count_timeout(call, index, self._budget)
            return
        except WorkerDied as error:
            answer = {"error": f"the worker {error}"}
        if "timeout" not in answer:
            self.num_errors += "error" in answer
            call.answers[index] = answer
        elif attempt + 1 < len(call.limits):
            call.waiting.append((index, attempt + 1))
        else:
            self._count_timeout(call, index, f"{self.timeout_seconds:g} s of processor time")

    @property
    def _budget(self) -> str:
        return f"the {self.budget_seconds:g} s of its call"

    def _count_timeout(self, call: _Call, index: int, limit: str) -> None:
        self.num_timeouts += 1
        call.answers[index] = {"timeout": f"no verdict within {limit}"}


class _Call:
    """The requests of one call: what waits and what runs, by index and number of the try, and what
    is known.
    """

    def __init__(self, requests: Sequence[Mapping[str, Any]], limits: Sequence[float]) -> None:
        self.requests = requests
        self.limits = limits
        self.waiting = deque((index, 0) for index in range(len(requests)))
        self.running: dict[Future[Reply], tuple[KillableWorker, int, int]] = {}
        self.answers: dict[int, Answer] = {}
        self.deadline: float | None = None


def _is_ready(worker: KillableWorker) -> bool:
    """Return whether a worker can take a request.

    Raises:
        WorkerNotStarted: It cannot be started.
    """
    if not worker.ready.done():
        return False
    worker.ready.result()
    return True


def _outcome(pair: tuple[str, str], answer: Answer) -> Outcome:
    """Return what a comparison found; what kept it from finding anything is logged."""
    if "equal" in answer:
        return "equal" if answer["equal"] else "different"
    what = answer.get("error") or answer["timeout"]
    logger.warning("grading: %s, the answer is left out; answer %r", what, pair[0][:80])
    return "error" if "error" in answer else "timeout"


def _kill_all(workers: Sequence[KillableWorker]) -> None:
    for worker in workers:
        worker.kill()

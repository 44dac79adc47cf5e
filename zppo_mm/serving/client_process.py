"""A pool of servers in a process of its own."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic

from data.worker import Header, KillableWorker, Reply, any_bytes
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.messages import Done, OutcomeT, PoolSettings, RequestT, Work
from zppo_mm.serving.servers import PROBE_SECONDS, RetryPolicy

logger = logging.getLogger(__name__)

_MODULE = "zppo_mm.serving.client_main"
CLOSING_SECONDS = 5.0
# The process keeps the time of questions itself. One that is so late, its start included, hangs and
# is ended.
OVERDUE_SECONDS = 120.0


class PoolProcess(Generic[RequestT, OutcomeT]):
    """Asks servers for answers in a process of its own, which starts with the first question.

    Should that process end, or hang, what it was asked is lost like questions to a server that does
    not answer, counted as `faults/client_process`, and the next question starts a new one.
    """

    def __init__(self, settings: PoolSettings[RequestT, OutcomeT]) -> None:
        self.counts: Counter[str] = Counter()
        self._settings = settings
        self._lock = threading.Lock()
        self._worker: KillableWorker | None = None

    def submit(self, requests: Sequence[RequestT], policy: RetryPolicy) -> Future[list[OutcomeT]]:
        """Start asking; see `Pool.submit`."""
        return self._submit(Work(tuple(requests), policy), policy.max_seconds)

    def probe(self) -> Future[dict[str, Fault | None]]:
        """Probe every server; see `Pool.probe`. The future raises a RuntimeError if no process
        is available.
        """
        return self._submit(Work(), PROBE_SECONDS)

    def close(self) -> None:
        """Drop what is in flight and end the process; a later question starts a new one."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close(CLOSING_SECONDS)

    def _submit(self, work: Work[RequestT], seconds: float) -> Future[Any]:
        future: Future[Any] = Future()
        deadline = time.monotonic() + seconds + OVERDUE_SECONDS
        with self._lock:
            if self._worker is None or not self._worker.is_running():
                level = logging.getLogger(_MODULE).getEffectiveLevel()
                self._worker = KillableWorker(_MODULE, notice=_log)
                self._worker.submit({}, pickle.dumps((level, self._settings)), deadline=deadline)
            reply = self._worker.submit(
                {}, pickle.dumps(work), deadline=deadline, receive=any_bytes
            )
        reply.add_done_callback(partial(self._settle, work, future))
        return future

    def _settle(self, work: Work[RequestT], future: Future[Any], reply: Future[Reply]) -> None:
        """Pass on what came of a piece of work."""
        if reply.cancelled():
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return
        error = reply.exception()
        if error is not None:
            problem = f"client_process: the process here that speaks with the servers {error}"
            if work.policy is None:
                hint = "expected it to serve; what it wrote to standard error says why"
                future.set_exception(RuntimeError(f"{self._settings.who}: {problem}, {hint}"))
                return
            logger.warning(
                "%s: %s; %d questions are lost", self._settings.who, problem, len(work.requests)
            )
            self.counts["faults/client_process"] += len(work.requests)
            future.set_result([self._settings.lost(problem) for _ in work.requests])
            return
        try:
            done: Done = pickle.loads(reply.result()[1])
        except Exception as unreadable:
            future.set_exception(unreadable)
            return
        self.counts.update(done.counts)
        if done.error is not None:
            future.set_exception(done.error)
        else:
            future.set_result(done.value)


def _log(header: Header, record: memoryview) -> None:
    """Log what the process logged."""
    logged: logging.LogRecord = pickle.loads(record)
    logging.getLogger(logged.name).handle(logged)

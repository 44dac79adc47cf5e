"""An `EndpointPool` in a process of its own."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from zppo_mm.interpreters import start_interpreter
from zppo_mm.teacher.served.chat_api import Ask, Fault
from zppo_mm.teacher.served.messages import Done, PoolSettings, Work
from zppo_mm.teacher.served.servers import PROBE_SECONDS, Outcome, Patience

logger = logging.getLogger(__name__)

_SERVER = "zppo_mm.teacher.served.client_main"
CLOSING_SECONDS = 5.0
# The process keeps the time of questions itself. One that is so late, its start included, hangs and
# is ended.
OVERDUE_SECONDS = 120.0
LOOK_SECONDS = 1.0
# What a scheduler, a launcher or a keyboard says to all processes is for the training process to
# heed, which may want its answers yet.
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class PoolProcess:
    """Asks servers for answers in a process of its own, which starts with the first question.
    Implements `Servers`.

    Should that process end, or hang, what it was asked is lost like questions to a server that does
    not answer, counted as `faults/client_process`, and the next question starts a new one.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.counts: Counter[str] = Counter()
        self._settings = settings
        self._lock = threading.Lock()
        self._client: _Client | None = None

    def submit(self, asks: Sequence[Ask], patience: Patience) -> Future[list[Outcome]]:
        """Start asking; see `Servers.submit`."""
        return self._hand_over(tuple(asks), patience)

    def probe(self) -> Future[dict[str, Fault | None]]:
        """Greet every server; see `Servers.probe`. The future raises a RuntimeError if no process
        can be had.
        """
        return self._hand_over((), None)

    def close(self) -> None:
        """Drop what is in flight and end the process; a later question starts a new one."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _hand_over(self, asks: tuple[Ask, ...], patience: Patience | None) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._client is None or self._client.is_gone:
                self._client = _Client(self._settings, self.counts)
            self._client.hand_over(asks, patience, future)
        return future


class _Client:
    """One process, what it is asked, and the thread that hears it."""

    def __init__(self, settings: PoolSettings, counts: Counter[str]) -> None:
        self._counts = counts
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[Work, Future[Any], float]] = {}
        self._lock = threading.Lock()
        self.is_gone = self._is_closing = self._hangs = False
        self._connection, other = multiprocessing.Pipe()
        with other:
            descriptor = other.fileno()
            # A process inherits what its parent blocks, so that no signal finds it unprepared.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
            try:
                self.process = start_interpreter(
                    _SERVER, str(descriptor), stdin=subprocess.DEVNULL, pass_fds=(descriptor,)
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._send((logging.getLogger(_SERVER).getEffectiveLevel(), settings))
        self._thread = threading.Thread(target=self._hear, name="teacher endpoints", daemon=True)
        self._thread.start()

    def hand_over(
        self, asks: tuple[Ask, ...], patience: Patience | None, future: Future[Any]
    ) -> None:
        """Send a piece of work, which is lost if the process has ended. Called by one thread at a
        time.
        """
        work = Work(next(self._numbers), asks, patience)
        deadline = (
            time.monotonic()
            + (PROBE_SECONDS if patience is None else patience.max_seconds)
            + OVERDUE_SECONDS
        )
        with self._lock:
            is_gone = self.is_gone
            if not is_gone:
                self._pending[work.number] = work, future, deadline
        if is_gone:
            self._lose(work, future)
        else:
            self._send(work)

    def close(self) -> None:
        """Tell the process to end, and end it."""
        self._is_closing = True
        self._send(None)
        self._thread.join(CLOSING_SECONDS)
        self.process.kill()
        self._thread.join()
        self._connection.close()

    def _send(self, thing: Any) -> None:
        try:
            self._connection.send(thing)
        except OSError:  # it has ended; the thread that hears it settles what is pending
            return

    def _hear(self) -> None:
        try:
            while True:
                if self._connection.poll(LOOK_SECONDS):
                    self._take(self._connection.recv())
                elif self._is_overdue():
                    self._hangs = True
                    self.process.kill()
        except (EOFError, OSError):
            logger.debug("teacher endpoints: the process is gone")
        except (
            Exception
        ):  # a message that cannot be read: nothing that it says can be relied on any more
            self.process.kill()
            raise
        finally:
            self._settle()

    def _is_overdue(self) -> bool:
        now = time.monotonic()
        with self._lock:
            return any(deadline < now for _, _, deadline in self._pending.values())

    def _take(self, message: logging.LogRecord | Done) -> None:
        if isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
            return
        self._counts.update(message.counts)
        with self._lock:
            _, future, _ = self._pending.pop(message.number)
        if not future.set_running_or_notify_cancel():
            return
        if message.error is not None:
            future.set_exception(message.error)
        else:
            future.set_result(message.value)

    def _settle(self) -> None:
        """Say of all that is pending that it will not come."""
        self.process.wait()
        with self._lock:
            self.is_gone = True
            pending = list(self._pending.values())
            self._pending.clear()
        if not self._is_closing:
            logger.warning("teacher: %s; %d calls are lost", self._problem(), len(pending))
        for work, future, _ in pending:
            self._lose(work, future)

    def _problem(self) -> str:
        how = (
            "did not answer in time and was ended"
            if self._hangs
            else f"ended with exit status {self.process.returncode}"
        )
        return f"client_process: the process here that speaks with the servers {how}"

    def _lose(self, work: Work, future: Future[Any]) -> None:
        problem = self._problem()
        if self._is_closing:
            future.cancel()
        elif not future.set_running_or_notify_cancel():
            return
        elif work.patience is None:
            future.set_exception(
                RuntimeError(
                    f"teacher: {problem}, expected it to serve; what it wrote to standard error "
                    "says why"
                )
            )
        else:
            self._counts["faults/client_process"] += len(work.asks)
            future.set_result([Outcome(problem=problem) for _ in work.asks])

"""Processes that may hang, swell or die: requests with deadlines, killed and replaced when they
fail.

A message is an 8-byte length, a JSON header and some bytes. `data.worker_process` is the other
side.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from data.worker_process import LENGTH, READY, send

logger = logging.getLogger(__name__)

START_SECONDS = 180.0  # importing libraries from a cold network disk on a loaded machine
# A library loses some memory on damaged input, so workers of a pool are replaced now and then.
MAX_REQUESTS = 10_000
MAX_HEADER_BYTES = 1 << 20
POLL_SECONDS = 0.5  # how late a deadline may be noticed
EXIT_SECONDS = 5.0  # time to end by itself, so that its own way of ending is seen
ENVIRONMENT = {
    # Threads of arithmetic libraries would count against the address space.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Memory of the last request is kept for the next: giving it back each time doubles the CPU time
    # of a small picture.
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
# What a scheduler, a launcher or a keyboard sends to all processes is for the owner to handle; it
# may still need its answers.
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

Header = Mapping[str, Any]
Reply = tuple[Header, memoryview]
Receive = Callable[[Header], memoryview]
"""Where the bytes of a reply go, by its header; raises ValueError, TypeError or KeyError if that
makes no sense.
"""


class WorkerDied(Exception):
    """The process ended, or sent what makes no sense and was ended; the message says how."""


class WorkerNotStarted(Exception):
    """The process ended before it was ready; the message says why."""


class _Closed(Exception):
    """The process closed its socket."""


class _Overdue(Exception):
    """A deadline passed."""


@dataclass(frozen=True, slots=True)
class _Pending:
    future: Future[Reply]
    deadline: float
    receive: Receive


def no_bytes(header: Header) -> memoryview:
    """Receive a reply that is a header alone."""
    return memoryview(b"")


def any_bytes(header: Header) -> memoryview:
    """Receive the bytes of a worker that is trusted."""
    return memoryview(bytearray(header["size"]))


class KillableWorker:
    """One process: a fresh interpreter, so that nothing is forked beside torch and NCCL.

    It takes any number of requests at once, from any thread. When one misses its deadline or the
    process dies, everything pending fails and the process is gone; a new worker replaces it. It
    ends with its owner, also one that is killed.

    Args:
        module: Run as `python -m module PID arguments`; uses `data.worker_process`.
        arguments: For its command line.
        notice: Gets messages of the process that answer no request.

    Attributes:
        ready: Done when the process can work; raises WorkerNotStarted if it cannot.
        num_requests: So far.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        notice: Callable[[Header, memoryview], None] | None = None,
    ) -> None:
        # -P: neither the working directory nor the module's own folder comes first on the import
        # path; names there are everyday ones.
        self._command = [sys.executable, "-P", "-m", module, str(os.getpid()), *arguments]
        self._notice = notice
        self._connection, self._child = socket.socketpair()
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._numbers = itertools.count(READY + 1)
        self.ready: Future[Reply] = Future()
        self._pending = {READY: _Pending(self.ready, time.monotonic() + START_SECONDS, no_bytes)}
        self._is_closed = False
        self._end = ""  # how the process ended
        self.num_requests = 0
        self.process: subprocess.Popen[bytes] | None = None
        is_started = threading.Event()
        # A process that asks for a signal at its parent's death gets it at the end of the thread
        # that started it, so that thread stays, and receives.
        self._thread = threading.Thread(
            target=self._run, args=(is_started,), name=module, daemon=True
        )
        self._thread.start()
        is_started.wait()

    def submit(
        self,
        header: Header,
        content: bytes | memoryview = b"",
        *,
        deadline: float,
        receive: Receive = no_bytes,
    ) -> Future[Reply]:
        """Send a request and return its reply to come.

        The future raises TimeoutError if the deadline passes, WorkerDied if the process ends or
        sends what makes no sense, WorkerNotStarted if it never got ready; it is cancelled if the
        worker is closed.

        Args:
            header: JSON values.
            content: Follows the header.
            deadline: By the monotonic clock.
            receive: Says where the reply's bytes go.
        """
        self.num_requests += 1
        future: Future[Reply] = Future()
        with self._lock:
            number = next(self._numbers)
            self._pending[number] = _Pending(future, deadline, receive)
        if self._end:
            self._fail_pending()
            return future
        try:
            with self._sending:
                send(self._connection, {**header, "number": number, "size": len(content)}, content)
        except OSError:
            # It has ended; the thread that receives fails what is pending.
            logger.debug("a worker is gone before its request")
        return future

    def is_running(self) -> bool:
        """Return whether the process still runs."""
        return self.process is not None and self._thread.is_alive() and self.process.poll() is None

    def close(self, patience_seconds: float = 0.0) -> None:
        """End the process and cancel what is pending.

        Args:
            patience_seconds: Time that it gets to end by itself.
        """
        self._is_closed = True
        if patience_seconds and self.is_running():
            with contextlib.suppress(OSError):  # it has just ended
                self._connection.shutdown(socket.SHUT_WR)
            self._thread.join(patience_seconds)
        self.kill()
        self._thread.join()

    def kill(self) -> None:
        """End the process, and its children, which share its process group."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _run(self, is_started: threading.Event) -> None:
        """Start the process, receive its messages, and fail what is pending at its end."""
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)  # the process inherits it
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            with self._child:
                self.process = subprocess.Popen(
                    self._command,
                    stdin=self._child.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                    start_new_session=True,
                )
        except OSError as error:
            self._end = str(error)
            self._fail_pending()
            return
        finally:
            is_started.set()
        cause = ""
        try:
            while True:
                self._take(self._receive_header())
        except _Overdue:
            self.kill()
            cause = "did not answer in time, "
        except (_Closed, OSError):
            logger.debug("a worker closed its connection")
        except (ValueError, TypeError, KeyError) as error:
            self.kill()
            cause = f"{type(error).__name__}, "
        finally:
            self._connection.close()
            self._end = cause + self._how_it_ended()
            self._fail_pending()

    def _how_it_ended(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.process.wait()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"ended with exit status {code}"

    def _take(self, header: Header) -> None:
        self._check_deadlines()
        if header["number"] is None and self._notice is not None:
            content = any_bytes(header)
            self._receive_into(content)
            self._notice(header, content)
            return
        pending = self._pending[header["number"]]
        view = pending.receive(header)
        # Still pending, so that its deadline holds for its bytes too.
        self._receive_into(view)
        with self._lock:
            del self._pending[header["number"]]
        if "not_started" in header:
            _fail(pending.future, WorkerNotStarted(str(header["not_started"])))
        elif pending.future.set_running_or_notify_cancel():
            pending.future.set_result((header, view))

    def _fail_pending(self) -> None:
        how = self._end
        with self._lock:
            pending, self._pending = list(self._pending.values()), {}
        has_started = self.ready.done() and self.ready.exception() is None
        now = time.monotonic()
        for each in pending:
            if self._is_closed:
                each.future.cancel()
            elif not has_started:
                _fail(each.future, WorkerNotStarted(how))
            elif each.deadline < now:
                _fail(each.future, TimeoutError(how))
            else:
                _fail(each.future, WorkerDied(how))

    def _receive_header(self) -> Header:
        prefix = bytearray(LENGTH.size)
        self._receive_into(memoryview(prefix))
        (length,) = LENGTH.unpack(prefix)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        encoded = bytearray(length)
        self._receive_into(memoryview(encoded))
        header = json.loads(encoded)
        if not isinstance(header, dict):
            raise TypeError("a header that is no object")
        return header

    def _receive_into(self, view: memoryview) -> None:
        while view:
            try:
                count = self._connection.recv_into(view, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._poll.poll(POLL_SECONDS * 1000)
                self._check_deadlines()
                continue
            if count == 0:
                raise _Closed
            view = view[count:]

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        with self._lock:
            if any(each.deadline < now for each in self._pending.values()):
                raise _Overdue


def _fail(future: Future[Reply], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


class WorkerPool:
    """A fixed number of workers, each with one request at a time and started when first needed;
    safe to use from several threads.

    Args:
        start: Starts a worker.
        num_workers: Most processes.
        timeout_seconds: Wall-clock time of one request, after which its process is killed.
    """

    def __init__(
        self, start: Callable[[], KillableWorker], num_workers: int, timeout_seconds: float
    ) -> None:
        self._start = start
        self._timeout_seconds = timeout_seconds
        self._slots: queue.LifoQueue[KillableWorker | None] = queue.LifoQueue(num_workers)
        for _ in range(num_workers):
            self._slots.put(None)
        # An owner that forgets to close it leaves no process behind.
        weakref.finalize(self, _kill_all, self._slots.queue).atexit = False

    def request(self, header: Header, content: bytes, receive: Receive) -> Header:
        """Return the header of a worker's reply; whatever is raised, the next request gets a
        working process.

        Raises:
            TimeoutError: The request took longer than the limit.
            WorkerDied: A fresh process ended on the request.
            WorkerNotStarted: No process gets ready.
        """
        worker = self._slots.get()
        try:
            if worker is not None and not _is_fit(worker):
                worker.close()
                worker = None
            if worker is not None:
                try:
                    return self._ask(worker, header, content, receive)
                except WorkerDied as error:
                    logger.info(
                        "a worker %s; asking a new one, because an earlier request may have been "
                        "the cause",
                        error,
                    )
            worker = self._start()
            return self._ask(worker, header, content, receive)
        except BaseException:
            if worker is not None:
                worker.close()
            raise
        finally:
            self._slots.put(worker if worker is not None and _is_fit(worker) else None)

    def close(self) -> None:
        """End all workers when their requests are answered; the next request starts new ones."""
        for worker in [self._slots.get() for _ in range(self._slots.maxsize)]:
            if worker is not None:
                worker.close()
            self._slots.put(None)

    def _ask(
        self, worker: KillableWorker, header: Header, content: bytes, receive: Receive
    ) -> Header:
        worker.ready.result()
        deadline = time.monotonic() + self._timeout_seconds
        return worker.submit(header, content, deadline=deadline, receive=receive).result()[0]


def _is_fit(worker: KillableWorker) -> bool:
    return worker.is_running() and worker.num_requests < MAX_REQUESTS


def _kill_all(workers: Sequence[KillableWorker | None]) -> None:
    for worker in workers:
        if worker is not None:
            worker.kill()

"""Processes that may hang, swell or die: one request at a time, each within a deadline; killed and
replaced when it fails.

A request and its answer are each an 8-byte length, a JSON header and some bytes.
`data.worker_process` is the other side.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.worker_process import LENGTH, send

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # importing libraries from a cold network disk
MAX_REQUESTS = (
    10_000  # a library loses some memory on damaged input, so workers are replaced now and then
)
MAX_HEADER_BYTES = 1 << 20
MAX_WAIT_SECONDS = 86_400.0  # a socket waits for some weeks at most
ENVIRONMENT = {
    # Threads of arithmetic libraries would count against the address space.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Memory of the last request is kept for the next: giving it back each time doubles the CPU time
    # of a small picture.
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}

Header = Mapping[str, Any]
Receive = Callable[[Header], memoryview]
"""Where the bytes of an answer go, by its header; raises ValueError, TypeError or KeyError if that
makes no sense.
"""


class WorkerDied(Exception):
    """The process ended, or said something that makes no sense and was ended; the message says
    how.
    """


class WorkerNotStarted(Exception):
    """The process ended before it was ready; the message says why."""


class _Gone(Exception):
    """The process closed its socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What one process may take.

    Attributes:
        memory_bytes: Address space.
        timeout_seconds: Wall-clock time of one request, after which it is killed. The kernel ends
            it at about twice this much CPU time, so that it does not work on when nobody is left to
            kill it.
    """

    memory_bytes: int
    timeout_seconds: float


class _Process(threading.Thread):
    """Starts a process and waits for its end.

    A process that asks for a signal at its parent's death gets it at the end of the thread that
    started it, so that thread stays.
    """

    def __init__(self, module: str, limits: WorkerLimits, connection: socket.socket) -> None:
        super().__init__(name=module, daemon=True)
        # -P: neither the working directory nor the module's own folder comes first on the import
        # path; names there are everyday ones.
        self._command = [
            sys.executable,
            "-P",
            "-m",
            module,
            str(os.getpid()),
            str(limits.memory_bytes),
            str(limits.timeout_seconds),
        ]
        self._connection = connection
        self._is_started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self.start()
        self._is_started.wait()
        if self._error is not None:
            raise WorkerNotStarted(str(self._error)) from self._error

    def run(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=self._connection.fileno(),
                stdout=subprocess.DEVNULL,
                # Libraries write pages there about forged input; what matters comes back in the
                # answer.
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # an interrupt from the keyboard is the owner's to handle
            )
        except OSError as error:
            self._error = error
            return
        finally:
            self._is_started.set()
        self._process.wait()

    def kill(self) -> None:
        """End the process if it still runs."""
        if self._process is not None and self.is_alive():
            self._process.kill()

    def how_it_ended(self, patience_seconds: float) -> str:
        """Return how the process ended; one that does not end by itself in some seconds is
        killed.
        """
        self.join(patience_seconds)
        self.kill()
        self.join()
        assert self._process is not None
        code = self._process.returncode
        return (
            f"ended by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit status {code}"
        )


class KillableWorker:
    """One process and the socket to it; for one thread at a time."""

    def __init__(self, module: str, limits: WorkerLimits) -> None:
        """Start `python -m module` and wait until it is ready.

        Args:
            module: Calls `data.worker_process.run`.
            limits: Of the process.

        Raises:
            WorkerNotStarted: It does not get ready.
        """
        self._num_requests = 0
        self._connection, child = socket.socketpair()
        with child:
            self._process = _Process(module, limits, child)
        # An owner that forgets to close it, or is interrupted while it starts, leaves no process
        # behind.
        self._finalizer = weakref.finalize(self, self._process.kill)
        try:
            self.ready: Header = self._receive_header(time.monotonic() + START_SECONDS)
        except (OSError, ValueError, _Gone) as error:
            raise WorkerNotStarted(
                f"{type(error).__name__}, {self.kill(patience_seconds=1.0)}"
            ) from error
        if "error" in self.ready:
            self.kill()
            raise WorkerNotStarted(str(self.ready["error"]))

    def request(self, header: Header, content: bytes, receive: Receive, deadline: float) -> Header:
        """Send one request and return the answer's header; after any error the process has ended.

        Args:
            header: JSON values.
            content: Follows the header.
            receive: Says where the answer's bytes go.
            deadline: By the monotonic clock.

        Raises:
            TimeoutError: The deadline passed.
            WorkerDied: The process ended, or its answer makes no sense.
        """
        self._num_requests += 1
        try:
            self._connection.settimeout(_remaining(deadline))
            send(self._connection, {**header, "size": len(content)}, content)
            answer = self._receive_header(deadline)
            self._receive_into(receive(answer), deadline)
            return answer
        except TimeoutError:
            self.kill()
            raise
        except (OSError, ValueError, TypeError, KeyError, _Gone) as error:
            raise WorkerDied(
                f"{type(error).__name__}, {self.kill(patience_seconds=5.0)}"
            ) from error
        except BaseException:
            self.kill()
            raise

    def is_fit(self) -> bool:
        """Return whether the process still runs and has not served its time."""
        return self._process.is_alive() and self._num_requests < MAX_REQUESTS

    def kill(self, patience_seconds: float = 0.0) -> str:
        """End the process and return how it ended.

        Args:
            patience_seconds: Time that it gets to end by itself, so that its own way of ending is
                seen.
        """
        self._connection.close()
        self._finalizer.detach()
        return self._process.how_it_ended(patience_seconds)

    def _receive_header(self, deadline: float) -> Header:
        prefix = bytearray(LENGTH.size)
        self._receive_into(memoryview(prefix), deadline)
        (length,) = LENGTH.unpack(prefix)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        encoded = bytearray(length)
        self._receive_into(memoryview(encoded), deadline)
        answer = json.loads(encoded)
        if not isinstance(answer, dict):
            raise TypeError("a header that is no object")
        return answer

    def _receive_into(self, view: memoryview, deadline: float) -> None:
        while view:
            self._connection.settimeout(_remaining(deadline))
            count = self._connection.recv_into(view)
            if count == 0:
                raise _Gone
            view = view[count:]


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return min(remaining, MAX_WAIT_SECONDS)


class WorkerPool:
    """A fixed number of workers, each started when first needed; safe to use from several
    threads.
    """

    def __init__(self, module: str, num_workers: int, limits: WorkerLimits) -> None:
        """Start nothing yet.

        Args:
            module: Calls `data.worker_process.run`.
            num_workers: Most processes, and most requests worked on at once.
            limits: Of each process.
        """
        self._module = module
        self._limits = limits
        self._num_workers = num_workers
        self._slots: queue.LifoQueue[KillableWorker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)

    def request(self, header: Header, content: bytes, receive: Receive) -> Header:
        """Return a worker's answer, as `KillableWorker.request`; whatever is raised, the next
        request gets a working process.

        Raises:
            TimeoutError: The request took longer than the limit.
            WorkerDied: A fresh process ended on the request.
            WorkerNotStarted: No process gets ready.
        """
        worker = self._slots.get()
        try:
            if worker is not None and not worker.is_fit():
                worker.kill()
                worker = None
            if worker is not None:
                try:
                    return worker.request(header, content, receive, self._deadline())
                except WorkerDied as error:
                    logger.info(
                        "a worker %s; asking a new one, because an earlier request may have been "
                        "the cause",
                        error,
                    )
            worker = KillableWorker(self._module, self._limits)
            return worker.request(header, content, receive, self._deadline())
        finally:
            self._slots.put(worker if worker is not None and worker.is_fit() else None)

    def _deadline(self) -> float:
        return time.monotonic() + self._limits.timeout_seconds

    def close(self) -> None:
        """End all workers; the next request starts new ones."""
        workers = [self._slots.get() for _ in range(self._num_workers)]
        for worker in workers:
            if worker is not None:
                worker.kill()
            self._slots.put(None)

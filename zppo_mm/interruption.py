"""Signals that end a run in good order: received at once, acted on where nothing is lost by it.

The signals are blocked, and a thread waits for them. So no call of a library is interrupted, and
processes that the run starts inherit that the signals are blocked: what a scheduler or a keyboard
sends to all processes is for the run itself.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: start the same command again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TICK_SECONDS = 0.5
HELD_FRACTION = 0.5
"""Fraction of the time for stopping after which answers that only the records want are not waited
for any more.
"""
LOG_SECONDS = 1.0


class StopRequested(Exception):
    """The run is to end; raised where what is under way can be dropped, on every rank alike."""


class RunStopped(Exception):
    """The run has ended in good order before its last step.

    Attributes:
        step: Steps that are complete and saved.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"stopped after step {step}; the same command continues ({reason})")
        self.step = step


class Interruption:
    """Whether this process's run is to end, and why.

    Outside `protected` nothing is under way that could be lost: a signal ends the process at once.
    Inside, the first signal asks the run to end; a second one, or the time, ends the process.
    Whoever started this process may pass on what a scheduler or a keyboard has said to all
    processes, so a signal of its and one of somebody else's are one.

    Args:
        end: Ends the process with an exit code, from any thread.

    Attributes:
        steps_done: Steps that a checkpoint has, `None` before that is known.
        reason: Why the run is to end; empty while it is not.
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self.steps_done: int | None = None
        self.reason = ""
        self._end_process = end
        self._is_protected = self._is_held = self._is_closed = False
        self._stop_seconds = 0.0
        self._started = time.monotonic()
        self._run_until = float("inf")
        self._deadline = float("inf")
        self._parent = os.getppid()
        self._num_received: Counter[bool] = Counter()
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Begin to receive signals; called by the main thread before any other thread is there.
        Without sigtimedwait nothing changes.
        """
        if not hasattr(signal, "sigtimedwait"):
            return
        # nohup's choice stands.
        signals = {
            number
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=self._listen, args=(signals,), name="signals", daemon=True).start()

    def limit(self, stop_seconds: float, max_hours: float) -> None:
        """Set the time from a request to the end of the process, and the hours from now on after
        which the run asks itself to end.
        """
        self._stop_seconds = stop_seconds
        self._run_until = self._started + 3600 * max_hours if max_hours else float("inf")

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Inside the block a signal asks the run to end instead of ending the process."""
        with self._lock:
            self._is_protected = True
        # The hours may be over before the first step: none is begun then, whenever the thread
        # checks next.
        self.check_clock()
        try:
            yield
        finally:
            with self._lock:
                self._is_protected = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block what is under way is finished: a request waits, unless most of its time
        has passed.
        """
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    @property
    def is_requested(self) -> bool:
        """Whether the run is to end."""
        return bool(self.reason)

    def is_due(self) -> bool:
        """Return whether the run is to end here, dropping what is under way; once true it stays so
        until a block of `held` begins.
        """
        if not self.reason:
            return False
        return (
            not self._is_held
            or time.monotonic() > self._deadline - (1 - HELD_FRACTION) * self._stop_seconds
        )

    def request(self, reason: str) -> None:
        """Ask the run to end."""
        with self._lock:
            if self.reason or not self._is_protected or self._is_closed:
                return
            self._deadline = time.monotonic() + self._stop_seconds
            self.reason = reason
        logger.info(
            "%s: the run ends in good order, within %g s; a second signal ends it at once",
            reason,
            self._stop_seconds,
        )

    def close(self) -> None:
        """Ignore everything from now on: the run has ended, and the process is about to."""
        with self._lock:
            self._is_closed = True

    def _listen(self, signals: set[signal.Signals]) -> None:
        while True:
            found = signal.sigtimedwait(signals, TICK_SECONDS)
            if found is not None:
                self.receive(signal.Signals(found.si_signo).name, found.si_pid)
            self.check_clock()

    def receive(self, name: str, sender: int) -> None:
        """Act on a signal."""
        with self._lock:
            self._num_received[sender == self._parent] += 1
            is_repeated = max(self._num_received.values()) > 1
            is_protected, is_closed = self._is_protected, self._is_closed
        if is_closed:
            return
        if not is_protected:
            where = (
                "before the first step"
                if self.steps_done is None
                else f"after step {self.steps_done}"
            )
            self._end(f"stopped {where}; the same command continues ({name})")
        elif not self.reason:
            self.request(name)
        elif is_repeated:
            self._end(
                "stopped at once; the same command continues from the newest complete checkpoint "
                f"(second signal, {name})"
            )

    def check_clock(self) -> None:
        """Ask the run to end when its hours are over; end the process when the time for that is
        over.
        """
        now = time.monotonic()
        if now > self._run_until:
            self.request("train.max_hours")
        if now > self._deadline:
            self._end(
                "stopped at once; the same command continues from the newest complete checkpoint "
                f"({self.reason}, and the run was not at its end within "
                f"train.stop_within_seconds={self._stop_seconds:g})"
            )

    def _end(self, line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            # In a thread of its own, because a terminal or a pipe that takes nothing must not keep
            # the process alive.
            writer = threading.Thread(target=logger.warning, args=("%s", line), daemon=True)
            writer.start()
            writer.join(LOG_SECONDS)
        if "RANK" in os.environ:
            # The other ranks get their own signal before they miss this one.
            time.sleep(LOG_SECONDS)
        self._end_process(EXIT_CODE)

"""The servers of a run on rank 0: each is watched by a thread of its own, which brings it to the
newest weights, and starts it again where it is the run's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from zppo_mm.errors import RolloutServersLostError
from zppo_mm.interruption import StopRequested
from zppo_mm.rollout.served.server_control import (
    PublishedWeights,
    ServerControl,
    ServerFaultError,
)
from zppo_mm.rollout.served.server_process import ServerProcess

logger = logging.getLogger(__name__)

JOIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SupervisionLimits:
    """When a server counts as dead.

    Attributes:
        start_seconds: Most time from its start to its first answer.
        silent_seconds: Most time without an answer later.
        max_faults: Faults of one server in a row, after which it is given up.
        poll_seconds: Time between two looks at it.
    """

    start_seconds: float
    silent_seconds: float = 60.0
    max_faults: int = 5
    poll_seconds: float = 1.0


class SupervisedServer:
    """One server and the thread that watches it.

    Args:
        control: Its routes.
        limits: When it counts as dead.
        changed: Notified whenever its state changes, and held while it does.
        counts: `failures` and `restarts` are added up here.
        start: Starts its process; `None` for a server that is not the run's.
    """

    def __init__(
        self,
        control: ServerControl,
        limits: SupervisionLimits,
        changed: threading.Condition,
        counts: Counter[str],
        start: Callable[[], ServerProcess] | None,
    ) -> None:
        self._control = control
        self._limits = limits
        self._changed = changed
        self._counts = counts
        self._start = start
        self._target: PublishedWeights | None = None
        self._loaded: PublishedWeights | None = None
        self._num_faults = 0
        self._last_fault = ""
        self._is_starting = start is not None
        self._is_closing = False
        self._since = time.monotonic()
        self._process = start() if start is not None else None
        self._thread = threading.Thread(target=self._watch, name=self.url, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Base URL."""
        return self._control.url

    @property
    def pid(self) -> int | None:
        """The process group of the run's own server."""
        return None if self._process is None else self._process.pid

    @property
    def is_failing(self) -> bool:
        """Whether it had a fault and has not loaded weights since."""
        return self._num_faults > 0

    @property
    def is_lost(self) -> bool:
        """Whether it had so many faults that it is given up."""
        return self._num_faults > self._limits.max_faults

    @property
    def last_fault(self) -> str:
        """The last one, for messages."""
        return self._last_fault

    def has(self, weights: PublishedWeights) -> bool:
        """Return whether it has proven that it has these weights."""
        return self._loaded is weights

    def aim_at(self, weights: PublishedWeights) -> None:
        """Have it load these weights; the lock must be held."""
        self._target = weights

    def close(self) -> None:
        """End the thread, and the process if it is the run's."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        process = self._process
        if process is not None:
            process.end()
        # A request that is under way ends with the process, or is left behind.
        self._thread.join(JOIN_SECONDS)
        self._control.close()

    def _watch(self) -> None:
        while True:
            target = self._target
            try:
                self._tend(target)
            except Exception as error:
                # Whatever it is: without this thread the run would wait for the server for ever.
                is_named = isinstance(error, ServerFaultError)
                fault = str(error) if is_named else f"{self.url}: {type(error).__name__}: {error}"
                self._fail(fault, is_current=target is self._target)
            with self._changed:
                if self._target is target and not self._is_closing:
                    self._changed.wait(self._limits.poll_seconds)
                if self._is_closing or (self.is_lost and self._start is not None):
                    return

    def _tend(self, target: PublishedWeights | None) -> None:
        """Bring the server one step closer to the target.

        Raises:
            ServerFaultError: It is dead, silent, or could not load the weights.
            OSError: Its process cannot be started.
        """
        self._start_again()
        if self._process is not None and not self._process.is_running():
            raise ServerFaultError(f"{self.url}: its process has ended; its log says why")
        now = time.monotonic()
        if not self._control.is_healthy():
            limits = self._limits
            limit = limits.start_seconds if self._is_starting else limits.silent_seconds
            if now - self._since > limit:
                raise ServerFaultError(f"{self.url}: no answer for {limit:g} s")
            return
        self._is_starting, self._since = False, now
        if target is None or self.has(target):
            return
        self._control.load(target)
        with self._changed:
            self._loaded, self._num_faults = target, 0
            self._changed.notify_all()

    def _fail(self, fault: str, is_current: bool) -> None:
        """Count a fault, and end the server if it is the run's."""
        with self._changed:
            if self._is_closing:
                return
            if not is_current and (self._process is None or self._process.is_running()):
                # A file that has made way for newer weights says nothing about the server.
                return
            self._loaded, self._last_fault = None, fault
            self._since = time.monotonic()
            self._num_faults += 1
            self._counts["failures"] += 1
            self._changed.notify_all()
        what = "given up" if self.is_lost else "started again" if self._start else "asked again"
        logger.warning("rollout server: %s; it is %s", fault, what)
        if self._process is None:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, self._limits.poll_seconds)
            return
        self._process.end()
        self._process = None

    def _start_again(self) -> None:
        """Start the server if it is the run's and was ended."""
        with self._changed:
            if self._start is None or self._process is not None or self._is_closing:
                return
            self._process, self._is_starting = self._start(), True
            self._since = time.monotonic()
            self._counts["restarts"] += 1


class RolloutServers:
    """All servers of a run.

    Args:
        controls: Of every server.
        limits: When one counts as dead.
        starts: Of every server, what starts its process; `None` for one that is not the run's.

    Raises:
        OSError: A process cannot be started; those before it are ended.

    Attributes:
        counts: `failures` of servers and `restarts` so far.
    """

    def __init__(
        self,
        controls: Sequence[ServerControl],
        limits: SupervisionLimits,
        starts: Sequence[Callable[[], ServerProcess] | None],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._limits = limits
        self._servers: list[SupervisedServer] = []
        with contextlib.ExitStack() as opened:
            for control, start in zip(controls, starts, strict=True):
                server = SupervisedServer(control, limits, self._changed, self.counts, start)
                opened.callback(server.close)
                self._servers.append(server)
            opened.pop_all()

    @property
    def urls(self) -> list[str]:
        """Base URLs, which stay the same when servers are started again."""
        return [server.url for server in self._servers]

    @property
    def pids(self) -> list[int]:
        """Process groups of the run's own servers."""
        return [server.pid for server in self._servers if server.pid is not None]

    def publish(self, weights: PublishedWeights, should_stop: Callable[[], bool]) -> None:
        """Wait until every server has the weights or is being brought back, and one has them.

        Args:
            weights: Also what servers get that are started again later.
            should_stop: Whether the run is to end.

        Raises:
            RolloutServersLostError: All servers were given up.
            StopRequested: The run is to end.
        """
        with self._changed:
            for server in self._servers:
                server.aim_at(weights)
            self._changed.notify_all()
            while True:
                ready = [server.has(weights) for server in self._servers]
                if any(ready) and all(
                    has or server.is_failing
                    for has, server in zip(ready, self._servers, strict=True)
                ):
                    return
                if all(server.is_lost for server in self._servers):
                    raise RolloutServersLostError(self._loss())
                if should_stop():
                    raise StopRequested
                self._changed.wait(self._limits.poll_seconds)

    def close(self) -> None:
        """End the threads and the run's own servers."""
        with ThreadPoolExecutor(max_workers=max(1, len(self._servers))) as pool:
            list(pool.map(SupervisedServer.close, self._servers))

    def _loss(self) -> str:
        faults = "; ".join(server.last_fault for server in self._servers)
        return (
            f"rollout: no server is left, got more than {self._limits.max_faults} faults in a row "
            f"of each, the last: {faults}; expected one that loads the weights; look at the "
            "servers' logs, then the same command continues"
        )

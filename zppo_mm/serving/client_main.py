"""The process that speaks with servers; `client_process` starts it and speaks with it.

Messages, frames and replies are made and read here, so that this work does not take turns with
sampling in one interpreter. What is exchanged is pickled; both ends are ours. It ends when the
other end does.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import traceback
from collections import Counter
from concurrent.futures import Future
from functools import partial
from logging.handlers import QueueHandler
from typing import Any

from data.errors import DataError
from data.worker_process import Channel
from zppo_mm.errors import ZppoError
from zppo_mm.serving.messages import Done, Pool, PoolSettings, Work

LOGGED = ("zppo_mm", "data")


class _LogSender(QueueHandler):
    """Sends log records to the other end, which decides what becomes of them."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send({"number": None}, pickle.dumps(record))  # type: ignore[attr-defined]


class _Results:
    """Asks the pool and sends what comes of it, and what it counted since the last result."""

    def __init__(self, channel: Channel, pool: Pool[Any, Any], who: str) -> None:
        self._channel = channel
        self._pool = pool
        self._who = who
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter()

    def start(self, number: int, work: Work[Any]) -> None:
        """Start a piece of work whose result is to be sent."""
        pool = self._pool
        future: Future[Any] = (
            pool.probe() if work.policy is None else pool.submit(work.requests, work.policy)
        )
        future.add_done_callback(partial(self._send, number))

    def _send(self, number: int, future: Future[Any]) -> None:
        """Send what came of a piece of work. What cannot be sent ends the process, so that nobody
        waits for it.
        """
        try:
            with self._lock:
                counts = Counter(dict(self._pool.counts))
                news, self._counted = counts - self._counted, counts
            done = self._done(future, news)
            self._channel.send({"number": number}, pickle.dumps(done))
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _done(self, future: Future[Any], counts: Counter[str]) -> Done:
        try:
            return Done(future.result(), None, counts)
        except (ZppoError, DataError) as known:
            return Done(None, known, counts)
        except Exception:  # a fault of ours is reported where it can end the run
            trace = self._pool.received.kept(traceback.format_exc())
            return Done(None, RuntimeError(f"{self._who} endpoints: {trace}"), counts)


def main() -> None:
    """Serve the owner until it closes the connection."""
    channel = Channel()
    channel.send_ready()
    received = channel.receive()
    if received is None:
        return
    level: int
    settings: PoolSettings[Any, Any]
    level, settings = pickle.loads(received[1])
    for name in LOGGED:
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).addHandler(_LogSender(channel))  # type: ignore[arg-type]
        logging.getLogger(name).propagate = False
    results = _Results(channel, settings.open_pool(), settings.who)
    channel.send({"number": received[0]["number"]})
    while (received := channel.receive()) is not None:
        results.start(received[0]["number"], pickle.loads(received[1]))
    # Nobody is left to send anything to: requests and decodings in flight are not waited for, and
    # decoders end with their sockets.
    os._exit(0)


if __name__ == "__main__":
    main()

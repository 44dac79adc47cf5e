"""The process that speaks with a teacher's servers; `pool_process` starts it and speaks with it.

Messages, frames and replies are made and read here, so that this work does not take turns with
sampling in one interpreter. What comes and goes is pickled; both ends are ours. It ends when the
other end does.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import Future
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any

from data.errors import DataError
from data.media.store import MediaStore
from zppo_mm.errors import ZppoError
from zppo_mm.teacher.served.messages import Done, Work
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.received_text import ReceivedText

LOGGED = ("zppo_mm", "data")


class _Forwarding(QueueHandler):
    """Sends log records to the other end, which decides what becomes of them."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(record)  # type: ignore[attr-defined]


class _Mouth:
    """Sends from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._counted: Counter[str] = Counter()

    def send(self, thing: Any) -> None:
        try:
            with self._lock:
                self._connection.send(thing)
        except OSError:  # nobody is left to hear it, and the main thread is about to see that too
            return

    def tell(self, pool: EndpointPool, number: int, future: Future[Any]) -> None:
        """Send what came of a piece of work. What cannot be said ends the process, so that nobody
        waits for it.
        """
        try:
            with self._counting:
                counts = Counter(dict(pool.counts))
                news = counts - self._counted
                self._counted = counts
            self.send(_done(number, future, news, pool.received))
        except Exception:
            traceback.print_exc()
            os._exit(1)


def _done(number: int, future: Future[Any], counts: Counter[str], received: ReceivedText) -> Done:
    try:
        return Done(number, future.result(), None, counts)
    except (ZppoError, DataError) as known:
        return Done(number, None, known, counts)
    except Exception:  # a fault of ours is reported where it can end the run
        return Done(
            number,
            None,
            RuntimeError(f"teacher endpoints: {received.kept(traceback.format_exc())}"),
            counts,
        )


def main(descriptor: int) -> None:
    """Serve the other end of a connection until it is closed, or says that it is done.

    Args:
        descriptor: The connection's file descriptor.
    """
    connection = Connection(descriptor)
    mouth = _Mouth(connection)
    log_level, settings = connection.recv()
    for name in LOGGED:
        logging.getLogger(name).setLevel(log_level)
        logging.getLogger(name).addHandler(_Forwarding(mouth))  # type: ignore[arg-type]
        logging.getLogger(name).propagate = False
    media = MediaStore(settings.limits) if settings.limits is not None else None
    pool = EndpointPool(
        settings.urls,
        settings.model,
        settings.config,
        settings.api_key,
        max_concurrency=settings.max_concurrency,
        first=settings.first,
        media=media,
        batch_size=settings.batch_size,
    )
    while (work := _hear(connection)) is not None:
        future: Future[Any] = (
            pool.probe() if work.patience is None else pool.submit(work.asks, work.patience)
        )
        future.add_done_callback(partial(mouth.tell, pool, work.number))
    # Nobody is left to hear anything: requests and decodings in flight are not waited for, and
    # decoders end with their sockets.
    os._exit(0)


def _hear(connection: Connection) -> Work | None:
    """Return the next piece of work; `None` if there will be none."""
    try:
        work: Work | None = connection.recv()
    except (EOFError, OSError):
        return None
    return work


if __name__ == "__main__":
    main(int(sys.argv[1]))

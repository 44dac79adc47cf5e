"""Opens the media of questions to come while the step before them runs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from data.errors import DataError
from data.question import Question

logger = logging.getLogger(__name__)


class MediaPrefetch:
    """Threads that open media ahead of time.

    What they do not get to, or cannot open, is opened when it is asked for, and counted there; so
    no result depends on them.

    Args:
        open_ahead: Opens a question's media for later; returns whether there was room for them.
        num_threads: Most questions opened at once.
    """

    def __init__(self, open_ahead: Callable[[Question], bool], num_threads: int) -> None:
        self._open_ahead = open_ahead
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="media")
        self._list: _List | None = None
        self._futures: list[Future[None]] = []

    def start(self, find: Callable[[], Iterable[Question]]) -> None:
        """Open the media of these questions in the background, in order; what is left of earlier
        ones is left.

        Args:
            find: Returns the questions; called in the background too.
        """
        self._leave()
        self._list = _List(find)
        self._futures = [
            self._pool.submit(self._open_all, self._list) for _ in range(self._num_threads)
        ]

    def wait(self) -> None:
        """Wait until all media that there is room for are open."""
        for future in self._futures:
            future.result()

    def close(self) -> None:
        """Leave what is not yet begun, and wait for the rest."""
        self._leave()
        self._pool.shutdown()

    def _leave(self) -> None:
        if self._list is not None:
            self._list.stop()

    def _open_all(self, questions: _List) -> None:
        try:
            while (question := questions.next()) is not None:
                self._open(question, questions)
        except Exception:
            # Nobody may be waiting for this thread.
            logger.exception("the media of the next questions are not opened ahead")
            raise

    def _open(self, question: Question, questions: _List) -> None:
        try:
            has_room = self._open_ahead(question)
        except (DataError, OSError) as error:
            logger.debug("question %s is not opened ahead: %s", question.id, error)
            return
        if not has_room:
            questions.stop()


class _List:
    """Questions that several threads take from, found by the first of them."""

    def __init__(self, find: Callable[[], Iterable[Question]]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._waiting: deque[Question] | None = None
        self._is_stopped = False

    def next(self) -> Question | None:
        """Return the next question with media, `None` after the last."""
        with self._lock:
            if self._is_stopped:
                return None
            if self._waiting is None:
                self._waiting = deque()
                try:
                    self._waiting.extend(question for question in self._find() if question.media)
                except (DataError, OSError) as error:
                    logger.debug("nothing is opened ahead: %s", error)
            return self._waiting.popleft() if self._waiting else None

    def stop(self) -> None:
        """Give out no more."""
        self._is_stopped = True

"""What the student's world and the teacher's say to each other: messages, signs of life and last
words, through the job's store.

Requests are numbered. Any student rank may make one; the teacher's leader alone reads them, answers
and cleans up, so that the store holds nothing that is not under way.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

from data.question import Question
from zppo_mm.experience import Rollout

# torch's store refuses values above 8 MiB.
CHUNK_BYTES = 4 * 2**20
POLL_SECONDS = 0.05
BEAT_SECONDS = 5.0
# Ranks that wait for their leader meet this often: a collective that lasts would run into its time
# limit.
MEETING_SECONDS = 5.0
# The last word of a world that ended as it should.
DONE = "done"


class Store(Protocol):
    """The part of torch's key-value stores that is needed; none of the calls here waits for another
    process.
    """

    def set(self, key: str, value: Any, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...

    def delete_key(self, key: str, /) -> bool: ...


@dataclass(frozen=True, slots=True)
class Greeting:
    """Is the teacher there? Answered with `True`."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions to be answered; the reply is a `Sampled`.

    Attributes:
        questions: By reference, as always.
        step: Rollout step, which names the random draws.
        asked_at: Wall-clock time, in seconds.
    """

    questions: tuple[Question, ...]
    step: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """Answers to `Questions`, not graded yet: parsed answers are `None`, and the rewards mean
    nothing.

    Attributes:
        rollouts: By question id; none where the prompt could not be made.
        seconds: From asking to the last answer.
    """

    rollouts: dict[str, tuple[Rollout, ...]]
    seconds: float


@dataclass(frozen=True, slots=True)
class Rewrites:
    """User texts to be answered once each; the reply is a list of texts."""

    texts: tuple[str, ...]
    step: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Judgements:
    """Prompts of the judge; the reply is a list of texts."""

    prompts: tuple[str, ...]


Request = Greeting | Questions | Rewrites | Judgements


class Channel:
    """One world's end.

    Args:
        store: The job's store.
        own: Name of this world.
        other: Name of the other one.
        silence_seconds: A world that has given no sign of life for so long is taken for dead.
        beats: Whether this process gives those of its own world.
    """

    def __init__(
        self, store: Store, own: str, other: str, *, silence_seconds: float, beats: bool
    ) -> None:
        self._store = store
        self._own = own
        self._other = other
        self._silence_seconds = silence_seconds
        self._last_beat = (0, time.monotonic())
        self._ended = threading.Event()
        if beats:
            threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    def request(self, request: Request) -> int:
        """Hand a request to the teacher; returns its number."""
        number = self._store.add("requests", 1)
        self._put(f"request/{number}", request)
        return number

    def has_reply(self, number: int) -> bool:
        """Return whether there is a reply to a request."""
        return self._store.check([f"reply/{number}"])

    def reply(self, number: int) -> Any:
        """Return the reply to a request, `None` while there is none."""
        return self._get(f"reply/{number}")

    def start(self, number: int) -> None:
        """Say that work on a request begins."""
        self._store.set(f"started/{number}", "1")

    def has_started(self, number: int) -> bool:
        """Return whether work on a request has begun."""
        return self._store.check([f"started/{number}"])

    def finish(self, number: int) -> None:
        """Say that a request needs no reply any more, because it was read or given up."""
        self._store.set(f"finished/{number}", "1")

    def take_request(self, number: int) -> Request | None:
        """Return a request and remove it from the store, `None` while there is none of this
        number.
        """
        request: Request | None = self._get(f"request/{number}")
        if request is not None:
            self._delete(f"request/{number}")
        return request

    def answer(self, number: int, reply: object) -> None:
        """Reply to a request."""
        self._put(f"reply/{number}", reply)

    def clear_if_finished(self, number: int) -> bool:
        """Remove the reply to a request that needs it no more; returns whether it is one."""
        if not self._store.check([f"finished/{number}"]):
            return False
        self._delete(f"reply/{number}")
        self._store.delete_key(f"started/{number}")
        self._store.delete_key(f"finished/{number}")
        return True

    def leave(self, problem: str = DONE) -> None:
        """Say that this world ends, and why; the first of its ranks to do so is heard. Of this rank
        no sign of life comes after it.
        """
        self._ended.set()
        # Without a store there is nobody left to hear it.
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(f"{self._own}/last_word", "", problem)

    def last_word(self) -> str | None:
        """Return what ended the other world, `DONE` if nothing went wrong, `None` while it has not
        ended.
        """
        key = f"{self._other}/last_word"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def is_other_silent(self) -> bool:
        """Return whether the other world's process is dead, or cut off, as far as can be seen from
        here.
        """
        beats, now = self._store.add(f"{self._other}/beats", 0), time.monotonic()
        if beats != self._last_beat[0]:
            self._last_beat = (beats, now)
        return now - self._last_beat[1] > self._silence_seconds

    def _beat(self) -> None:
        # The store goes with the process that holds it; whoever needs it next says so.
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set():
                self._store.add(f"{self._own}/beats", 1)
                self._ended.wait(BEAT_SECONDS)

    def _put(self, key: str, message: object) -> None:
        data = pickle.dumps(message)
        starts = range(0, len(data), CHUNK_BYTES)
        for place, start in enumerate(starts):
            self._store.set(f"{key}/{place}", data[start : start + CHUNK_BYTES])
        self._store.set(key, str(len(starts)))  # last: what can be seen is whole

    def _get(self, key: str) -> Any:
        if not self._store.check([key]):
            return None
        return pickle.loads(
            b"".join(
                self._store.get(f"{key}/{place}") for place in range(int(self._store.get(key)))
            )
        )

    def _delete(self, key: str) -> None:
        if self._store.check([key]):
            for place in range(int(self._store.get(key))):
                self._store.delete_key(f"{key}/{place}")
            self._store.delete_key(key)

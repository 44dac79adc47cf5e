"""Protocols of a teacher, in this process or behind a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from data.question import Question
from zppo_mm.errors import ZppoError
from zppo_mm.experience import Rollout


class TeacherLostError(ZppoError):
    """The teacher does not answer, and the configuration does not allow going on without it."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A response to be compressed, with its parsed final answer."""

    question: Question
    text: str
    answer: str | None


@dataclass(frozen=True, slots=True)
class CompressedTrace:
    """A compressed response.

    Attributes:
        text: At most the cap's tokens, same final answer as the trace.
        method: `rewritten`, or `cut` if no rewrite was faithful.
        rejects: Rewrites refused because they changed the answer or had no complete summary.
    """

    text: str
    method: str
    rejects: int


@dataclass(frozen=True, slots=True)
class Hint:
    """A hint made of a correct response.

    Attributes:
        text: Without the answer; `None` if none could be made.
        rejects: Texts of the teacher refused because they gave the answer away.
    """

    text: str | None
    rejects: int = 0


class Answers(Protocol):
    """Answers on their way. Every rank holds one and makes the same calls."""

    @property
    def seconds(self) -> float:
        """Time from submission to the last answer; known after `wait`."""
        ...

    def is_ready(self) -> bool:
        """Return whether `wait` would return at once; the same on every rank."""
        ...

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        """Return fresh, verified rollouts by question id, the same on every rank; empty for a
        question without an answer.

        Raises:
            TeacherLostError: On every rank, if the teacher does not answer and the run is not to go
                on without it.
        """
        ...


class Teacher(Protocol):
    """Answers hard questions and rewrites responses. Every rank calls with the same arguments and
    gets the same results.
    """

    def submit(self, questions: Sequence[Question], step: int) -> Answers:
        """Start answering each original question, as often as the teacher has rollouts."""
        ...

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        """Return one response per user text; `None` where there is none."""
        ...


class Compressor(Protocol):
    """Shortens responses to candidates."""

    def compress(self, traces: Sequence[Trace], step: int) -> list[CompressedTrace]:
        """Return one compressed trace per trace, in order."""
        ...


class HintWriter(Protocol):
    """Makes hints of correct responses."""

    def write(self, traces: Sequence[Trace], step: int) -> list[Hint]:
        """Return one hint per trace, in order."""
        ...

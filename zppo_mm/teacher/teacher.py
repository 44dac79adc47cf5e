"""What a teacher promises: an in-process model today, a served one later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from data.question import Question
from zppo_mm.experience import Rollout


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
        method: `rewritten`, or `cut` when no faithful rewrite was had.
        rejects: Rewrites refused because they changed the answer.
    """

    text: str
    method: str
    rejects: int


class Teacher(Protocol):
    """Answers hard questions and compresses responses. Every rank calls with the same arguments and gets the same results."""

    def answer(self, questions: Sequence[Question], step: int) -> list[tuple[Rollout, ...]]:
        """Return fresh, verified rollouts per question, drawn from the original question."""
        ...


class Compressor(Protocol):
    """Shortens responses to candidates."""

    def compress(self, traces: Sequence[Trace], step: int) -> list[CompressedTrace]:
        """Return one compressed trace per trace, in order."""
        ...

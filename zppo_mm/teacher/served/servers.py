"""Answers of a model's servers to messages, while the caller does other things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from zppo_mm.teacher.served.chat_api import ChatRequest, Choice, Fault

# Time for the answer to a probe.
PROBE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Limits of a request's attempts.

    Attributes:
        max_seconds: Time for all attempts together, from when the question is handed over.
        num_retries: Further attempts of one request; `None` means as many as the time allows.
        is_urgent: The student is idle until it is answered: it does not queue behind answers that
            nobody waits for yet.
    """

    max_seconds: float
    num_retries: int | None
    is_urgent: bool = False


@dataclass(slots=True)
class Outcome:
    """What came of one `ChatRequest`.

    Attributes:
        choices: By their index among the wanted answers; some or all may be missing.
        problem: Why any are missing; empty if none is.
        is_refused: The message itself could not be made or was refused, or the model has no answer,
            by no fault of the servers.
        has_no_answer: The model ended without an answer.
        seconds: From being handed over to the end.
    """

    choices: dict[int, Choice] = field(default_factory=dict)
    problem: str = ""
    is_refused: bool = False
    has_no_answer: bool = False
    seconds: float = 0.0

    def answers(self) -> list[Choice]:
        """Return the answers that came, in the order of their indices."""
        return [self.choices[index] for index in sorted(self.choices)]


class Servers(Protocol):
    """Answers messages.

    Attributes:
        counts: Requests, retries, faults by kind and tokens so far, under the names of the metrics
            without `teacher/`.
    """

    counts: Counter[str]

    def submit(self, requests: Sequence[ChatRequest], policy: RetryPolicy) -> Future[list[Outcome]]:
        """Start asking; the future has one outcome per request, in order, and no fault of a server
        makes it raise.
        """
        ...

    def probe(self) -> Future[dict[str, Fault | None]]:
        """Ask every server for one token, once; the future says by address what kept it from
        answering, `None` where nothing did.
        """
        ...

    def close(self) -> None:
        """Drop what is in flight; the futures of that are cancelled or raise."""
        ...

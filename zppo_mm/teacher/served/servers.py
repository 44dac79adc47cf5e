"""Answers of a model's servers to messages, while the caller does other things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from zppo_mm.serving.fault import Fault
from zppo_mm.serving.servers import RequestOutcome, RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest, Choice


@dataclass(slots=True)
class Outcome(RequestOutcome):
    """What came of one `ChatRequest`.

    Attributes:
        choices: By their index among the wanted answers; some or all may be missing.
    """

    choices: dict[int, Choice] = field(default_factory=dict)

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

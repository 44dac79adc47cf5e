"""How often and how long servers are asked, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# Time for the answer to a probe.
PROBE_SECONDS = 60.0


class ConnectionLimits(Protocol):
    """Limits of a request to servers, and of what is in flight there; sections of the configuration
    have them.
    """

    @property
    def connect_timeout_seconds(self) -> float:
        """For a connection."""
        ...

    @property
    def read_timeout_seconds(self) -> float:
        """Longest time without data."""
        ...

    @property
    def request_timeout_seconds(self) -> float:
        """For one whole request."""
        ...

    @property
    def num_retries(self) -> int:
        """Further draws of an answer that the model does not give."""
        ...

    @property
    def backoff_seconds(self) -> float:
        """Longest pause before the first retry."""
        ...

    @property
    def max_concurrency(self) -> int:
        """Most requests in flight at one server."""
        ...


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
class RequestOutcome:
    """What came of one request.

    Attributes:
        problem: Why anything that was asked for is missing; empty if nothing is.
        is_refused: The message itself could not be made or was refused, or the model has no answer,
            by no fault of the servers.
        has_no_answer: The model ended without an answer.
        seconds: From being handed over to the end.
    """

    problem: str = ""
    is_refused: bool = False
    has_no_answer: bool = False
    seconds: float = 0.0

"""Messages between a `PoolProcess` and its process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText
from zppo_mm.serving.servers import RequestOutcome, RetryPolicy

RequestT = TypeVar("RequestT")
RequestT_contra = TypeVar("RequestT_contra", contravariant=True)
OutcomeT = TypeVar("OutcomeT", bound=RequestOutcome)


class Pool(Protocol[RequestT_contra, OutcomeT]):
    """Asks servers, in this process; `ServerPool` is the common part of those that there are.

    Attributes:
        counts: Requests, retries, faults by kind and tokens so far.
        received: Makes what the servers send fit to be kept and shown.
    """

    counts: Counter[str]
    received: ReceivedText

    def submit(
        self, requests: Sequence[RequestT_contra], policy: RetryPolicy
    ) -> Future[list[OutcomeT]]:
        """Start asking; the future has one outcome per request, in order, and no fault of a server
        makes it raise.
        """
        ...

    def probe(self) -> Future[dict[str, Fault | None]]:
        """Ask every server once; the future says by address what kept it from answering, `None`
        where nothing did.
        """
        ...


class PoolSettings(Protocol[RequestT_contra, OutcomeT]):
    """What a pool is made of; it is pickled."""

    @property
    def who(self) -> str:
        """Whose servers they are, for messages."""
        ...

    def open_pool(self) -> Pool[RequestT_contra, OutcomeT]:
        """Return the pool; called in the process."""
        ...

    def lost(self, problem: str) -> OutcomeT:
        """Return what comes of a request if the process ends."""
        ...


@dataclass(frozen=True, slots=True)
class Work(Generic[RequestT]):
    """What is to be done: send `requests`, or probe the servers if there is no policy."""

    requests: tuple[RequestT, ...] = ()
    policy: RetryPolicy | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a piece of work.

    Attributes:
        value: Result of the pool's future, unless it raised.
        error: What it raised.
        counts: What the pool counted since the last one.
    """

    value: Any
    error: Exception | None
    counts: Counter[str]

"""vLLM servers that continue prompts, in a process of its own or in this one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from zppo_mm.rollout.served.requests import NO_ROUTE, GenerateCall, ServedRequest
from zppo_mm.rollout.served.results import GenerateOutcome
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.pool import ServerPool
from zppo_mm.serving.servers import PROBE_SECONDS, ConnectionLimits, RetryPolicy

WHO = "rollout"
HEALTH_PATH = "/health"
MAX_HEALTH_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of requests to the servers. Implements `ConnectionLimits`."""

    connect_timeout_seconds: float
    read_timeout_seconds: float
    request_timeout_seconds: float
    num_retries: int
    backoff_seconds: float
    max_concurrency: int


class GeneratePool(ServerPool):
    """Asks vLLM servers for continuations in a thread of its own.

    Args:
        urls: Base URLs, without a path.
        limits: Time-outs, pauses and connections.
        api_key: Sent as a bearer token; empty sends none.
        first: Which server is preferred among equally busy ones.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: ConnectionLimits,
        api_key: str = "",
        first: int = 0,
    ) -> None:
        super().__init__(urls, limits, api_key, who=WHO, first=first)

    def submit(
        self, requests: Sequence[ServedRequest], policy: RetryPolicy
    ) -> Future[list[GenerateOutcome]]:
        """Start asking; the future has one outcome per request, in order, and no fault of a server
        makes it raise.
        """
        return self._start(self._all(requests, policy))

    def probe(self) -> Future[dict[str, Fault | None]]:
        """Ask every server for its health, once; the future says by address what kept it from
        answering, `None` where nothing did.
        """
        return self._start(self._probe_all())

    async def _probe_all(self) -> dict[str, Fault | None]:
        replies = await self._ask_each(HEALTH_PATH, None, MAX_HEALTH_BYTES, PROBE_SECONDS)
        return {url: reply if isinstance(reply, Fault) else None for url, reply in replies.items()}

    async def _all(
        self, requests: Sequence[ServedRequest], policy: RetryPolicy
    ) -> list[GenerateOutcome]:
        return list(await asyncio.gather(*(self._outcome(each, policy) for each in requests)))

    async def _outcome(self, request: ServedRequest, policy: RetryPolicy) -> GenerateOutcome:
        outcome = GenerateOutcome()
        await self._settle(outcome, self._collect(request, outcome, policy), policy)
        return outcome

    async def _collect(
        self, request: ServedRequest, outcome: GenerateOutcome, policy: RetryPolicy
    ) -> None:
        call = GenerateCall(request, self.received)
        try:
            outcome.generations = await self._attempts(call, outcome, policy)
        except Fault as fault:
            if fault.kind == "http_404":
                raise Fault(fault.kind, fault.detail + NO_ROUTE) from fault
            raise
        self.counts["prompt_tokens"] += len(request.token_ids)
        self.counts["completion_tokens"] += sum(
            len(each.response_ids) for each in outcome.generations
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratePoolSettings:
    """The arguments of a `GeneratePool`. Implements `PoolSettings`."""

    urls: tuple[str, ...]
    limits: Limits
    api_key: str = field(default="", repr=False)
    first: int = 0

    @property
    def who(self) -> str:
        """Whose servers they are."""
        return WHO

    def open_pool(self) -> GeneratePool:
        """Return the pool."""
        return GeneratePool(self.urls, self.limits, self.api_key, self.first)

    def lost(self, problem: str) -> GenerateOutcome:
        """Return what comes of a prompt if the process ends."""
        return GenerateOutcome(problem=problem, is_client_lost=True)

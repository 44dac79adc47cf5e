"""Several servers of one model: least outstanding first, bounded concurrency, retries with back-off
and jitter, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import httpx2

from data.errors import ReasonedError
from zppo_mm.serving.endpoint import MAX_PAUSE_SECONDS, Endpoint, open_client
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText
from zppo_mm.serving.servers import ConnectionLimits, RequestOutcome, RetryPolicy

logger = logging.getLogger(__name__)

T = TypeVar("T")
ReplyT_co = TypeVar("ReplyT_co", covariant=True)
# Requests that the student is idle for have this fraction of connections to themselves.
URGENT_FRACTION = 0.25


class Call(Protocol[ReplyT_co]):
    """What is asked until a server answers it."""

    @property
    def path(self) -> str:
        """Behind the base URL."""
        ...

    @property
    def max_reply_bytes(self) -> int:
        """Longest reply, decoded."""
        ...

    @property
    def is_greedy(self) -> bool:
        """Whether another draw of the model is the same."""
        ...

    async def body(self, draw: int) -> bytes:
        """Return the request; what the model did not answer is asked with the next draw.

        Raises:
            ReasonedError: It cannot be made.
        """
        ...

    def read(self, content: bytes) -> ReplyT_co:
        """Return what a reply says.

        Raises:
            Fault: Nothing that can be used.
        """
        ...

    def is_settled_by(self, fault: Fault, kinds: Mapping[str, int]) -> bool:
        """Return whether a fault settles the call for a reason of its own, after so many of each
        kind.
        """
        ...


class ServerPool:
    """Asks servers in a thread of its own.

    Args:
        urls: Base URLs of the servers.
        limits: Time-outs, pauses and connections.
        api_key: Sent as a bearer token; empty sends none.
        who: Whose servers they are, for messages.
        max_concurrency: Most requests in flight at one server, from this process, urgent ones
            apart; 0 takes that of the limits.
        first: Which server is preferred among equally busy ones, so that processes do not all start
            with the same one.

    Attributes:
        counts: Requests, retries and faults by kind so far.
        received: Makes what the servers send fit to be kept and shown.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: ConnectionLimits,
        api_key: str = "",
        *,
        who: str,
        max_concurrency: int = 0,
        first: int = 0,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.received = ReceivedText(api_key)
        self._limits = limits
        self._api_key = api_key
        self._who = who
        self._max_concurrency = max_concurrency or limits.max_concurrency
        self._endpoints = [
            Endpoint(url) for url in [*urls[first % len(urls) :], *urls[: first % len(urls)]]
        ]
        self._jitter = random.Random(first)
        self._client: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._freed = asyncio.Event()

    def close(self) -> None:
        """Drop what is in flight and end the thread."""
        loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def ask_each(
        self, path: str, body: bytes | None, *, max_bytes: int, timeout_seconds: float
    ) -> Future[dict[str, bytes | Fault]]:
        """Ask every server the same, once and at the same time; the future has by address the body
        of the reply, or what kept it from coming. Without a body it is a GET.
        """
        return self._start(self._ask_each(path, body, max_bytes, timeout_seconds))

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=self._loop.run_forever, name=f"{self._who} endpoints", daemon=True
            ).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def _ask_each(
        self, path: str, body: bytes | None, max_bytes: int, timeout_seconds: float
    ) -> dict[str, bytes | Fault]:
        client = self._connections()

        async def ask(endpoint: Endpoint) -> bytes | Fault:
            try:
                return await endpoint.ask(
                    client,
                    path,
                    body,
                    max_bytes=max_bytes,
                    timeout_seconds=timeout_seconds,
                    received=self.received,
                )
            except Fault as fault:
                return Fault(fault.kind, self.received.shown(fault.detail))

        replies = await asyncio.gather(*map(ask, self._endpoints))
        return {
            endpoint.url: reply for endpoint, reply in zip(self._endpoints, replies, strict=True)
        }

    def _connections(self) -> httpx2.AsyncClient:
        if self._client is None:
            self._client = open_client(self._limits, self._api_key, self._who)
        return self._client

    async def _settle(
        self, outcome: RequestOutcome, work: Coroutine[Any, Any, None], policy: RetryPolicy
    ) -> None:
        """Do what a request needs, and note in its outcome what kept it from an answer."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(policy.max_seconds):
                await work
            outcome.problem = ""
        except TimeoutError:
            outcome.problem = f"not answered within {policy.max_seconds:g} s" + (
                f", last {outcome.problem}" if outcome.problem else ""
            )
        except Fault as fault:
            outcome.problem = self.received.shown(str(fault))
            outcome.is_refused = fault.is_refusal or fault.is_of_model
            outcome.has_no_answer = fault.is_of_model
        except ReasonedError as error:
            outcome.problem, outcome.is_refused = f"{error.reason}: {error}", True
        outcome.seconds = time.monotonic() - started

    async def _attempts(
        self, call: Call[T], outcome: RequestOutcome, policy: RetryPolicy, draw: int = 0
    ) -> T:
        """Try one call until a server answers it. What the model did not answer is drawn again,
        what a server refused asked elsewhere.

        Raises:
            Fault: The last one, when the retries are used up or the message is refused.
            ReasonedError: The message cannot be made.
        """
        body = b""
        avoided: Endpoint | None = None
        attempt = 0
        kinds: Counter[str] = Counter()
        while True:
            async with self._slot(avoided, policy.is_urgent) as endpoint:
                body = body or await call.body(draw)
                self.counts["requests"] += 1
                try:
                    content = await endpoint.ask(
                        self._connections(),
                        call.path,
                        body,
                        max_bytes=call.max_reply_bytes,
                        timeout_seconds=self._limits.request_timeout_seconds,
                        received=self.received,
                    )
                    # A long one would hold up the other requests of the loop.
                    return await asyncio.to_thread(call.read, content)
                except Fault as fault:
                    backoff = self._backoff_seconds(attempt)
                    endpoint.failed(fault, backoff)
                    self._count_fault(fault, outcome)
                    kinds[fault.kind] += 1
                    # Another greedy draw of the model is the same.
                    is_settled = fault.is_of_model and call.is_greedy
                    if is_settled or self._is_last(call, fault, kinds, attempt, policy):
                        raise
                    avoided = endpoint
                    if fault.is_of_model:
                        draw, body = draw + 1, b""
            self.counts["retries"] += 1
            attempt += 1
            await asyncio.sleep(backoff)

    def _is_last(
        self,
        call: Call[T],
        fault: Fault,
        kinds: Mapping[str, int],
        attempt: int,
        policy: RetryPolicy,
    ) -> bool:
        """Return whether a fault settles a call, which has had so many faults of each kind."""
        seen = kinds[fault.kind]
        if fault.is_refusal:
            # One of several servers may be set up otherwise.
            return seen >= min(2, len(self._endpoints))
        if call.is_settled_by(fault, kinds):
            return True
        if fault.is_of_model and seen > self._limits.num_retries:
            return True
        return policy.num_retries is not None and attempt >= policy.num_retries

    @asynccontextmanager
    async def _slot(self, avoided: Endpoint | None, is_urgent: bool) -> AsyncIterator[Endpoint]:
        """Wait for room at a server that is not paused; the one that just failed comes last."""
        extra = max(1, int(URGENT_FRACTION * self._max_concurrency)) if is_urgent else 0
        while True:
            now = time.monotonic()
            free = [
                endpoint
                for endpoint in self._endpoints
                if endpoint.outstanding < self._max_concurrency + extra
            ]
            awake = [endpoint for endpoint in free if endpoint.paused_until <= now]
            if awake:
                break
            self._freed.clear()
            pause = min((endpoint.paused_until - now for endpoint in free), default=None)
            try:
                async with asyncio.timeout(pause):
                    await self._freed.wait()
            except TimeoutError:
                continue
        chosen = min(awake, key=lambda endpoint: (endpoint is avoided, endpoint.outstanding))
        chosen.outstanding += 1
        try:
            yield chosen
        finally:
            chosen.outstanding -= 1
            self._freed.set()

    def _backoff_seconds(self, attempt: int) -> float:
        """Double the pause with every attempt; half of it is drawn, so that many requests do not
        come back together.
        """
        longest = min(MAX_PAUSE_SECONDS, self._limits.backoff_seconds * 2.0 ** min(attempt, 30))
        return longest * self._jitter.uniform(0.5, 1.0)

    def _count_fault(self, fault: Fault, outcome: RequestOutcome) -> None:
        self.counts[f"faults/{fault.kind}"] += 1
        outcome.problem = self.received.shown(str(fault))
        logger.debug("%s endpoint: %s", self._who, outcome.problem)

"""Several servers of one model: least outstanding first, bounded concurrency, retries with back-off
and jitter, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import httpx2

from data.errors import ReasonedError
from data.text import clean_text
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.teacher.served.chat_api import Batch, ChatRequest, Fault, Reply
from zppo_mm.teacher.served.endpoint import MAX_PAUSE_SECONDS, Endpoint, open_client
from zppo_mm.teacher.served.media import Media, MessageWriter
from zppo_mm.teacher.served.received_text import ReceivedText
from zppo_mm.teacher.served.servers import PROBE_SECONDS, Outcome, RetryPolicy

logger = logging.getLogger(__name__)

T = TypeVar("T")
# How servers that take one answer per request refuse several: some call it a fault of their own,
# which may also pass.
ONE_EACH = ("http_400", "http_422", "http_500", "http_501")
# How servers refuse a field that they do not know.
UNKNOWN_FIELD = ("http_400", "http_422")
# Requests that the student is idle for have this fraction of connections to themselves.
URGENT_FRACTION = 0.25


class EndpointPool:
    """Asks servers for answers in a thread of its own. Implements `Servers`.

    Args:
        urls: Base URLs of the servers.
        model: The served model's name.
        config: Time-outs and pauses.
        api_key: Sent as a bearer token; empty sends none.
        max_concurrency: Most requests in flight at one server, from this process, urgent ones
            apart.
        first: Which server is preferred among equally busy ones, so that processes do not all start
            with the same one.
        media: Opens the media of messages; `None` if none has any.
        batch_size: Messages that are sampled together, if the server is that of a teacher on ranks
            of its own; 0 for any other.

    Attributes:
        received: Makes what the servers send fit to be kept and shown.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        config: TeacherConfig,
        api_key: str = "",
        *,
        max_concurrency: int = 0,
        first: int = 0,
        media: Media | None = None,
        batch_size: int = 0,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._model = model
        self._config = config
        self._api_key = api_key
        self.received = ReceivedText(api_key)
        self._max_concurrency = max_concurrency or config.max_concurrency
        self._endpoints = [
            Endpoint(url) for url in [*urls[first % len(urls) :], *urls[: first % len(urls)]]
        ]
        self._writer = MessageWriter(config, media)
        self._jitter = random.Random(first)
        self._sends_n = True
        self._sends_optional_kwargs = True
        self._batch_size = batch_size
        self._batch_names = (f"{secrets.token_hex(8)}/{number}" for number in itertools.count())
        self._client: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._freed = asyncio.Event()

    def submit(self, requests: Sequence[ChatRequest], policy: RetryPolicy) -> Future[list[Outcome]]:
        """Start asking; the future has one outcome per request, in order, and no fault of a server
        makes it raise.
        """
        if self._batch_size:
            requests = self._batched(requests, policy.is_urgent)
        return self._start(self._all(requests, policy))

    def probe(self) -> Future[dict[str, Fault | None]]:
        """Ask every server for one token, once; the future says by address what kept it from
        answering, `None` where nothing did.
        """
        return self._start(self._probe_all())

    def close(self) -> None:
        """Drop what is in flight and end the thread."""
        loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def _batched(self, requests: Sequence[ChatRequest], is_urgent: bool) -> list[ChatRequest]:
        batched: list[ChatRequest] = []
        for start in range(0, len(requests), self._batch_size):
            part = requests[start : start + self._batch_size]
            name = next(self._batch_names)
            batched += [
                replace(request, batch=Batch(name, index, len(part), is_urgent))
                for index, request in enumerate(part)
            ]
        return batched

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=self._loop.run_forever, name="teacher endpoints", daemon=True
            ).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def _probe_all(self) -> dict[str, Fault | None]:
        hello = ChatRequest(
            "Hello",
            num_choices=1,
            temperature=0.0,
            max_tokens=1,
            seed=0,
            chat_template_kwargs=self._config.chat_template_kwargs,
        )
        body = await self._body(hello, 1, 0, 0)

        async def probe(endpoint: Endpoint) -> Fault | None:
            try:
                await endpoint.complete(
                    self._connections(), body, hello, 1, PROBE_SECONDS, self.received
                )
            except Fault as fault:
                return Fault(fault.kind, self.received.shown(fault.detail))
            return None

        return dict(
            zip(
                (e.url for e in self._endpoints),
                await asyncio.gather(*map(probe, self._endpoints)),
                strict=True,
            )
        )

    def _connections(self) -> httpx2.AsyncClient:
        if self._client is None:
            self._client = open_client(self._config, self._api_key)
        return self._client

    async def _all(self, requests: Sequence[ChatRequest], policy: RetryPolicy) -> list[Outcome]:
        return list(await asyncio.gather(*(self._outcome(request, policy) for request in requests)))

    async def _outcome(self, request: ChatRequest, policy: RetryPolicy) -> Outcome:
        outcome, started = Outcome(), time.monotonic()
        try:
            async with asyncio.timeout(policy.max_seconds):
                await self._collect(request, outcome, policy)
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
        return outcome

    async def _collect(self, request: ChatRequest, outcome: Outcome, policy: RetryPolicy) -> None:
        """Ask for all answers in one request where servers honour `n`, and for each that is missing
        alone.
        """
        draw = 0
        if self._sends_n and request.num_choices > 1:
            reply = await self._several(request, outcome, policy)
            outcome.choices.update(enumerate(reply.choices))
            # A server that drew several may have used the seeds of those that are missing for those
            # that came.
            draw = int(reply.num_returned > 1)
        missing = range(len(outcome.choices), request.num_choices)

        async def fill(index: int) -> None:
            reply = await self._request(request, 1, index, outcome, policy, draw)
            outcome.choices[index] = reply.choices[0]

        # One that fails must not take the others with it.
        results = await asyncio.gather(*(fill(index) for index in missing), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _several(self, request: ChatRequest, outcome: Outcome, policy: RetryPolicy) -> Reply:
        """Ask for all answers in one request, and for the first alone where that is refused; see
        `_request`.
        """
        try:
            reply = await self._request(request, request.num_choices, 0, outcome, policy)
            takes_one = reply.num_returned == 1
        except Fault as fault:
            if fault.kind not in ONE_EACH:
                raise
            reply = await self._request(request, 1, 0, outcome, policy)
            takes_one = fault.kind != "http_500"
        if takes_one and self._sends_n:
            self._sends_n = False
            logger.info(
                "the served model returns one answer per request: each is asked for on its own "
                "from now on"
            )
        return reply

    async def _request(
        self,
        request: ChatRequest,
        num_choices: int,
        first: int,
        outcome: Outcome,
        policy: RetryPolicy,
        draw: int = 0,
    ) -> Reply:
        """Ask with the variables of the chat template, and if they are refused and not needed,
        without; see `_attempts`.
        """
        how = (num_choices, first, outcome, policy, draw)
        bare = replace(request, chat_template_kwargs={})
        is_bare_enough = bool(request.chat_template_kwargs) and not request.needs_template_kwargs
        if is_bare_enough and not self._sends_optional_kwargs:
            return await self._attempts(bare, *how)
        try:
            return await self._attempts(request, *how)
        except Fault as fault:
            if not is_bare_enough or fault.kind not in UNKNOWN_FIELD:
                raise
        reply = await self._attempts(bare, *how)
        # What is refused for its text is refused without them too.
        self._sends_optional_kwargs = False
        logger.info("the judge's server refuses chat_template_kwargs: it is asked without them")
        return reply

    async def _attempts(
        self,
        request: ChatRequest,
        num_choices: int,
        first: int,
        outcome: Outcome,
        policy: RetryPolicy,
        draw: int,
    ) -> Reply:
        """Try one request until a server answers it. What the model did not answer is drawn again,
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
                body = body or await self._body(request, num_choices, first, draw)
                self.counts["requests"] += 1
                try:
                    limit = self._config.request_timeout_seconds
                    reply = await endpoint.complete(
                        self._connections(), body, request, num_choices, limit, self.received
                    )
                except Fault as fault:
                    backoff = self._backoff_seconds(attempt)
                    endpoint.failed(fault, backoff)
                    self._count_fault(fault, outcome)
                    kinds[fault.kind] += 1
                    # Another greedy draw of the model is the same.
                    is_settled = fault.is_of_model and not request.temperature
                    if is_settled or self._is_last(fault, kinds, num_choices, attempt, policy):
                        raise
                    avoided = endpoint
                    if fault.is_of_model:
                        draw, body = draw + 1, b""
                else:
                    self.counts["prompt_tokens"] += reply.prompt_tokens
                    self.counts["completion_tokens"] += reply.completion_tokens
                    self.counts.update(
                        {f"faults/{kind}": count for kind, count in reply.dropped.items()}
                    )
                    return reply
            self.counts["retries"] += 1
            attempt += 1
            await asyncio.sleep(backoff)

    def _is_last(
        self,
        fault: Fault,
        kinds: Mapping[str, int],
        num_choices: int,
        attempt: int,
        policy: RetryPolicy,
    ) -> bool:
        """Return whether a fault settles a request, which has had so many faults of each kind."""
        seen = kinds[fault.kind]
        if fault.is_refusal:
            # One of several servers may be set up otherwise.
            return seen >= min(2, len(self._endpoints))
        if num_choices > 1 and fault.kind in ONE_EACH:  # once may be chance
            return seen >= 2 and sum(kinds.values()) == seen
        if fault.is_of_model and seen > self._config.num_retries:
            return True
        return policy.num_retries is not None and attempt >= policy.num_retries

    async def _body(self, request: ChatRequest, num_choices: int, first: int, draw: int) -> bytes:
        def write() -> bytes:
            # A teacher on ranks of its own opens media, and escapes special tokens, as the student.
            content = (
                self._writer.content(request.text, request.media)
                if request.batch is None
                else clean_text(request.text)
            )
            return request.body(self._model, content, num_choices, first, draw)

        # Opening media takes time and would hold up the other requests of the loop.
        return await asyncio.to_thread(write) if request.media else write()

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
        longest = min(MAX_PAUSE_SECONDS, self._config.backoff_seconds * 2.0 ** min(attempt, 30))
        return longest * self._jitter.uniform(0.5, 1.0)

    def _count_fault(self, fault: Fault, outcome: Outcome) -> None:
        self.counts[f"faults/{fault.kind}"] += 1
        outcome.problem = self.received.shown(str(fault))
        logger.debug("teacher endpoint: %s", outcome.problem)

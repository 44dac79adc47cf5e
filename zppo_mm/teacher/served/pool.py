"""Servers of chat completions: several answers by one request where a server gives them, fields
that it refuses left out.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from data.question import Turn
from data.text import clean_text
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.pool import ServerPool
from zppo_mm.serving.received_text import ReceivedText
from zppo_mm.serving.servers import PROBE_SECONDS, RetryPolicy
from zppo_mm.teacher.served.chat_api import Batch, ChatRequest, Reply
from zppo_mm.teacher.served.chat_reply import parse_reply
from zppo_mm.teacher.served.media import Media, MessageWriter
from zppo_mm.teacher.served.servers import Outcome

logger = logging.getLogger(__name__)

COMPLETIONS_PATH = "/chat/completions"
# How servers that take one answer per request refuse several: some call it a fault of their own,
# which may also pass.
ONE_EACH = ("http_400", "http_422", "http_500", "http_501")
# How servers refuse a field that they do not know.
UNKNOWN_FIELD = ("http_400", "http_422")


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A chat request for some of its answers. Implements `Call`.

    Attributes:
        request: The message.
        num_choices: Answers asked for.
        first: Of them, by its index among the wanted ones.
        model: The served model's name.
        writer: Makes the message.
        received: Makes the reply's texts fit to be kept and shown.
    """

    request: ChatRequest
    num_choices: int
    first: int
    model: str
    writer: MessageWriter
    received: ReceivedText
    path = COMPLETIONS_PATH

    @property
    def max_reply_bytes(self) -> int:
        """Longest reply, decoded."""
        return self.request.max_reply_bytes(self.num_choices)

    @property
    def is_greedy(self) -> bool:
        """Whether another draw of the model is the same."""
        return not self.request.temperature

    async def body(self, draw: int) -> bytes:
        """Return the request; opening media takes time and would hold up the other requests of the
        loop.
        """
        if self.request.media:
            return await asyncio.to_thread(self._write, draw)
        return self._write(draw)

    def read(self, content: bytes) -> Reply:
        """Return the answers of a reply."""
        return parse_reply(
            content,
            self.num_choices,
            self.request.top_logprobs,
            self.received,
            has_token_ids=self.request.batch is not None,
        )

    def is_settled_by(self, fault: Fault, kinds: Mapping[str, int]) -> bool:
        """Return whether servers that give one answer each have refused several."""
        if self.num_choices == 1 or fault.kind not in ONE_EACH:
            return False
        seen = kinds[fault.kind]
        return seen >= 2 and sum(kinds.values()) == seen  # once may be chance

    def _write(self, draw: int) -> bytes:
        request = self.request
        # A teacher on ranks of its own opens media, and escapes special tokens, as the student.
        messages = (
            self.writer.messages(request.text, request.media, request.earlier)
            if request.batch is None
            else [
                {"role": turn.role, "content": clean_text(turn.text)}
                for turn in (*request.earlier, Turn("user", request.text))
            ]
        )
        return request.body(self.model, messages, self.num_choices, self.first, draw)


class EndpointPool(ServerPool):
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
        super().__init__(
            urls, config, api_key, who="teacher", max_concurrency=max_concurrency, first=first
        )
        self._model = model
        self._config = config
        self._writer = MessageWriter(config, media)
        self._sends_n = True
        self._sends_optional_kwargs = True
        self._batch_size = batch_size
        self._batch_names = (f"{secrets.token_hex(8)}/{number}" for number in itertools.count())

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

    async def _probe_all(self) -> dict[str, Fault | None]:
        hello = ChatRequest(
            "Hello",
            num_choices=1,
            temperature=0.0,
            max_tokens=1,
            seed=0,
            chat_template_kwargs=self._config.chat_template_kwargs,
        )
        call = self._call(hello, 1, 0)
        replies = await self._ask_each(
            call.path, await call.body(0), call.max_reply_bytes, PROBE_SECONDS
        )

        def problem(reply: bytes | Fault) -> Fault | None:
            if isinstance(reply, Fault):
                return reply
            try:
                call.read(reply)
            except Fault as fault:
                return Fault(fault.kind, self.received.shown(fault.detail))
            return None

        return {url: problem(reply) for url, reply in replies.items()}

    def _call(self, request: ChatRequest, num_choices: int, first: int) -> ChatCall:
        return ChatCall(request, num_choices, first, self._model, self._writer, self.received)

    async def _all(self, requests: Sequence[ChatRequest], policy: RetryPolicy) -> list[Outcome]:
        return list(await asyncio.gather(*(self._outcome(request, policy) for request in requests)))

    async def _outcome(self, request: ChatRequest, policy: RetryPolicy) -> Outcome:
        outcome = Outcome()
        await self._settle(outcome, self._collect(request, outcome, policy), policy)
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
        asked = (num_choices, first, outcome, policy, draw)
        bare = replace(request, chat_template_kwargs={})
        is_bare_enough = bool(request.chat_template_kwargs) and not request.needs_template_kwargs
        if is_bare_enough and not self._sends_optional_kwargs:
            return await self._reply(bare, *asked)
        try:
            return await self._reply(request, *asked)
        except Fault as fault:
            if not is_bare_enough or fault.kind not in UNKNOWN_FIELD:
                raise
        reply = await self._reply(bare, *asked)
        # What is refused for its text is refused without them too.
        self._sends_optional_kwargs = False
        logger.info("the judge's server refuses chat_template_kwargs: it is asked without them")
        return reply

    async def _reply(
        self,
        request: ChatRequest,
        num_choices: int,
        first: int,
        outcome: Outcome,
        policy: RetryPolicy,
        draw: int,
    ) -> Reply:
        """Try one request until a server answers it; see `_attempts`."""
        call = self._call(request, num_choices, first)
        reply = await self._attempts(call, outcome, policy, draw)
        self.counts["prompt_tokens"] += reply.prompt_tokens
        self.counts["completion_tokens"] += reply.completion_tokens
        self.counts.update({f"faults/{kind}": count for kind, count in reply.dropped.items()})
        return reply

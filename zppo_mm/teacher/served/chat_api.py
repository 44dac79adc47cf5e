"""What is said to an OpenAI-compatible server, and what comes back: request bodies, replies, and
what can be wrong with them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from data.question import MediaRef
from zppo_mm.experience import FinishReason, FloatArray, IntArray
from zppo_mm.teacher.served.received_text import ReceivedText

logger = logging.getLogger(__name__)

# No reply to a good request is longer: room for what stands around the answers, and for the JSON of
# one token, or of one listed log-prob.
BASE_REPLY_BYTES = 2**20
TOKEN_BYTES = 256
MAX_SPELLING_BYTES = 4096

# Servers' words, in any case, for an answer that the model ended (nobody asks for stop sequences
# here: such a one is the end of its turn), that met the limit, that was held back because of what
# it says, and for something else that the model made of the message.
COMPLETE = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"})
AT_LIMIT = frozenset(
    {"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded"}
)
HELD_BACK = frozenset(
    {"content_filter", "content_filtered", "refusal", "safety", "sensitive", "recitation",
    "prohibited_content", "blocklist", "spii",
     "guardrail_intervened", "error_toxic"}
)  # fmt: skip
NO_ANSWER = frozenset({"tool_calls", "tool_use", "function_call", "repetition"})

# What parts of an answer are: its text, and a reasoning.
TEXT_PARTS = frozenset({"text", "output_text"})
REASONING_PARTS = frozenset({"thinking", "reasoning"})
# Between the seeds of one answer's draws; no message has more answers.
DRAW_SEEDS = 2**20

T = TypeVar("T")

Content = str | Sequence[Mapping[str, Any]]
"""Content of a user message: a text, or parts with media first."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that a teacher on ranks of its own samples together, however they arrive, so that
    the same run computes the same.

    Attributes:
        name: Of the batch.
        index: Of the request in it.
        size: Requests in it.
        is_urgent: Whether the student is idle until it is answered.
    """

    name: str
    index: int
    size: int
    is_urgent: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """One user message and how often it is to be answered.

    Attributes:
        text: Of the message.
        num_choices: Answers wanted.
        temperature: 0 is greedy.
        max_tokens: Longest answer.
        seed: Names the server's random stream; answer i asked on its own has `seed + i`, and other
            ones when it is drawn again.
        top_logprobs: Most likely tokens that are to come with every token of the answers; 0 asks
            for no log-probs.
        media: What the message shows, in order. They are opened when its turn comes, so that those
            of waiting messages take no memory.
        stream: Random stream, as `GroupSampler` names it: `rollout` or `respond`, and a name.
        batch: Set for the server of `chat_server` alone, which reads the stream, the batch and
            references to the media, and returns the tokens.
    """

    text: str
    num_choices: int
    temperature: float
    max_tokens: int
    seed: int
    top_logprobs: int = 0
    media: tuple[MediaRef, ...] = ()
    stream: tuple[str, ...] = ()
    batch: Batch | None = None

    def max_reply_bytes(self, num_choices: int) -> int:
        """Return what the reply to a request for `num_choices` answers may take, decoded."""
        listed = 2 + self.top_logprobs if self.top_logprobs else 1
        return BASE_REPLY_BYTES + num_choices * self.max_tokens * TOKEN_BYTES * listed

    def body(
        self, model: str, content: Content, num_choices: int, first: int, draw: int = 0
    ) -> bytes:
        """Return the JSON request that asks a content for `num_choices` answers from answer `first`
        on; each `draw` has other seeds.
        """
        request: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "top_p": 1.0,
            "max_tokens": self.max_tokens,
            "seed": (self.seed + first + draw * DRAW_SEEDS) % 2**31,
            "stream": False,
        }
        if num_choices > 1:
            request["n"] = num_choices
        if self.top_logprobs:
            request |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.batch is not None:
            request["zppo"] = {
                "stream": self.stream,
                "batch": asdict(self.batch),
                "media": [asdict(ref) for ref in self.media],
            }
        return json.dumps(request, ensure_ascii=False).encode("utf-8", errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class ServedToken:
    """One token of an answer.

    Attributes:
        spelling: Its bytes.
        logprob: Of this token.
        top: Spelling and log-prob of the most likely tokens in its place.
    """

    spelling: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer.

    Attributes:
        text: All that the model wrote: a reasoning that the server tells apart comes first, after
            `<think>`, and closed only if something follows it.
        finish_reason: `length` if it met the limit.
        content: The text without a reasoning that the server tells apart.
        tokens: What the model wrote, token by token, reasoning and markup included; empty if the
            server tells no log-probs.
        token_ids: `[response]` ids and log-probs of a teacher on ranks of its own, in its
            vocabulary; `None` from any other server.
    """

    text: str
    finish_reason: FinishReason
    content: str
    tokens: tuple[ServedToken, ...] = ()
    token_ids: tuple[IntArray, FloatArray] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply.

    Attributes:
        choices: Answers that can be used, at most as many as were asked for.
        num_returned: Answers returned, others included.
        prompt_tokens: As the server counts them; 0 if it does not.
        completion_tokens: The same of all answers together.
        dropped: Answers that cannot be used, by the kind of their fault, or are more than were
            asked for (`surplus_choice`).
    """

    choices: tuple[Choice, ...]
    num_returned: int
    prompt_tokens: int
    completion_tokens: int
    dropped: Counter[str] = field(default_factory=Counter)


class Fault(Exception):
    """One attempt failed.

    Attributes:
        kind: Fixed name to count by: connection, certificate, timeout, cut_off, too_large,
            bad_reply, empty_choice, unfinished, content_filter, http_<status>.
        detail: In words.
        retry_after_seconds: How long the server asks to be left alone.
        is_refusal: The message itself is at fault, and another attempt would fail as well.
        is_of_model: The server works, but the model gave no answer: another draw may bring one,
            waiting does not.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        retry_after_seconds: float | None = None,
        is_refusal: bool = False,
        is_of_model: bool = False,
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        self.is_refusal = is_refusal
        self.is_of_model = is_of_model

    def __reduce__(self) -> tuple[type[Fault], tuple[str, str, float | None, bool, bool]]:
        return type(self), (
            self.kind,
            self.detail,
            self.retry_after_seconds,
            self.is_refusal,
            self.is_of_model,
        )


def parse_reply(
    body: bytes,
    num_choices: int,
    num_top: int | None = None,
    received: ReceivedText | None = None,
    has_token_ids: bool = False,
) -> Reply:
    """Read a chat completion.

    Args:
        body: The whole response.
        num_choices: Answers asked for; surplus ones are dropped.
        num_top: Most likely tokens asked for with every token; 0 reads no tokens, `None` all that
            are there.
        received: Makes its texts fit to be kept and shown.
        has_token_ids: Whether it is of `chat_server`, which returns tokens; an answer without text
            is one there.

    Raises:
        Fault: It is not a chat completion (`bad_reply`), or none of its answers can be used: they
            have no text (`empty_choice`), were neither ended by the model nor by the limit
            (`unfinished`), or were held back (`content_filter`).
    """
    received = received or ReceivedText()
    try:
        reply = json.loads(body.decode("utf-8-sig", errors="replace"))
        listed = _checked(reply["choices"], list)
        # A choice is known by its index: one that a server repeats must not count twice.
        by_index: dict[int, Mapping[str, Any]] = {}
        for place, item in enumerate(listed):
            index = item.get("index")
            by_index.setdefault(index if type(index) is int else place, item)
        found = [
            _choice(by_index[index], num_top, received, has_token_ids) for index in sorted(by_index)
        ]
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        what = f"{type(error).__name__}: {received.shown(str(error))}"
        raise Fault(
            "bad_reply", f"not a chat completion ({what}), got {received.shown(body)!r}"
        ) from error
    usable = [choice for choice in found if isinstance(choice, Choice)]
    faults = [fault for fault in found if isinstance(fault, Fault)]
    if not usable:
        raise (
            next((fault for fault in faults if not fault.is_refusal), faults[0])
            if faults
            else Fault("empty_choice", "no choices")
        )
    dropped = Counter(fault.kind for fault in faults)
    dropped["surplus_choice"] = len(listed) - len(found) + max(0, len(usable) - num_choices)
    usage = reply.get("usage")
    counts = [
        _count(usage.get(name)) if isinstance(usage, dict) else 0
        for name in ("prompt_tokens", "completion_tokens")
    ]
    return Reply(tuple(usable[:num_choices]), len(listed), counts[0], counts[1], +dropped)


def _choice(
    choice: Mapping[str, Any], num_top: int | None, received: ReceivedText, has_token_ids: bool
) -> Choice | Fault:
    """Return an answer, or why it is none."""
    message = _checked(choice["message"], dict)
    content, thought, refusal = _texts(message.get("content"))
    reasoning = _texts(message.get("reasoning_content") or message.get("reasoning"))[0] or thought
    reason = choice.get("finish_reason")
    named = reason.lower() if isinstance(reason, str) else ""
    told = f"finish_reason {received.shown(repr(reason))}"
    if named in HELD_BACK or refusal or message.get("refusal"):
        return Fault(
            "content_filter", f"{told}: the server or the model refuses the answer", is_refusal=True
        )
    if named not in COMPLETE | AT_LIMIT or choice.get("error"):
        problem = (
            f" and an error: {received.shown(repr(choice['error']))}" if choice.get("error") else ""
        )
        return Fault(
            "unfinished",
            f"{told}{problem}, expected 'stop' or 'length'",
            is_of_model=named in NO_ANSWER,
        )
    if not (content or reasoning or has_token_ids):
        why = (
            "; the limit may have come in a reasoning that the server does not show"
            if named in AT_LIMIT
            else ""
        )
        return Fault("empty_choice", f"no text, {told}{why}", is_of_model=True)
    content, reasoning = received.kept(content), received.kept(reasoning)
    text = _with_reasoning(reasoning, content) if reasoning else content
    tokens = _tokens(choice, num_top, received) if num_top != 0 else ()
    finish_reason: FinishReason = "length" if named in AT_LIMIT else "stop"
    token_ids = _token_ids(choice) if has_token_ids and "token_ids" in choice else None
    return Choice(text, finish_reason, content, tokens, token_ids)


def _token_ids(choice: Mapping[str, Any]) -> tuple[IntArray, FloatArray]:
    ids = np.array(choice["token_ids"], dtype=np.int64)
    logprobs = np.array(choice["token_logprobs"], dtype=np.float32)
    return ids, logprobs


def _with_reasoning(reasoning: str, content: str) -> str:
    """Return both as the model wrote them. Without content nobody knows whether the model closed
    its reasoning, so nobody does it here.
    """
    opened = f"<think>\n{reasoning.strip().removeprefix('<think>').strip()}"
    return f"{opened}\n</think>\n\n{content}" if content else opened


def _texts(content: Any) -> tuple[str, str, str]:
    """Return text, reasoning and refusal of what may come in parts; empty for none."""
    if not isinstance(content, list):
        return _checked(content, str) if content is not None else "", "", ""
    texts, reasonings, refusals = [""], [""], [""]
    for part in content:
        kind = part.get("type", "text")
        if kind in TEXT_PARTS:
            texts.append(part["text"])
        elif kind in REASONING_PARTS:
            inner = part.get("thinking") or part.get("text")
            reasonings.append(_texts(inner)[0])
        elif kind == "refusal":
            refusals.append(part["refusal"])
        else:
            raise ValueError(f"a part of type {kind!r}")
    return "".join(texts), "".join(reasonings), "".join(refusals)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _tokens(
    choice: Mapping[str, Any], num_top: int | None, received: ReceivedText
) -> tuple[ServedToken, ...]:
    """Return what the server tells of an answer's tokens; nothing if that cannot be read, which
    does not take the answer away.
    """
    try:
        listed = _checked(choice["logprobs"]["content"], list)
        return tuple(_token(item, num_top, received) for item in listed)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        logger.debug(
            "teacher: no log-probs: %s: %s", type(error).__name__, received.shown(str(error))
        )
        return ()


def _token(item: Mapping[str, Any], num_top: int | None, received: ReceivedText) -> ServedToken:
    # Some servers list the written token besides those asked for.
    top = _checked(item.get("top_logprobs") or [], list)[: None if num_top is None else num_top + 1]
    return ServedToken(
        _spelling(item, received),
        _logprob(item),
        tuple((_spelling(each, received), _logprob(each)) for each in top),
    )


def _logprob(item: Mapping[str, Any]) -> float:
    value = item["logprob"]
    if type(value) not in (int, float):
        raise TypeError(f"logprob is no number, got {type(value).__name__}")
    return float(value)


def _spelling(item: Mapping[str, Any], received: ReceivedText) -> bytes:
    """Return a token's bytes; part of a character has no text, so servers tell them apart."""
    listed = item.get("bytes")
    if listed is None:
        spelling = received.kept(_checked(item["token"], str)).encode()
    else:
        spelling = received.kept_bytes(
            bytes(_checked(byte, int) for byte in _checked(listed, list))
        )
    if len(spelling) > MAX_SPELLING_BYTES:
        raise ValueError(f"a token of {len(spelling)} bytes, expected at most {MAX_SPELLING_BYTES}")
    return spelling


def _checked(value: Any, kind: type[T]) -> T:
    """Return a value of a JSON type; a boolean is no number.

    Raises:
        TypeError: It is of another.
    """
    if type(value) is not kind:
        raise TypeError(f"got {type(value).__name__}, expected {kind.__name__}")
    return value

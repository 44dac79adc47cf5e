"""Reads a server's reply, and says what is wrong with it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from zppo_mm.experience import FinishReason, FloatArray, IntArray
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText
from zppo_mm.teacher.served.chat_api import Choice, Reply, ServedToken

logger = logging.getLogger(__name__)

MAX_SPELLING_BYTES = 4096

# Finish reasons in any case: the model ended the answer (no request has stop sequences, so one is
# the end of its turn); it met the limit; it was withheld because of its content; the model did
# something else than answer.
COMPLETE = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"})
AT_LIMIT = frozenset(
    {"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded"}
)
WITHHELD = frozenset(
    {"content_filter", "content_filtered", "refusal", "safety", "sensitive", "recitation",
    "prohibited_content", "blocklist", "spii",
     "guardrail_intervened", "error_toxic"}
)  # fmt: skip
NO_ANSWER = frozenset({"tool_calls", "tool_use", "function_call", "repetition"})

# What parts of an answer are: its text, and a reasoning.
TEXT_PARTS = frozenset({"text", "output_text"})
REASONING_PARTS = frozenset({"thinking", "reasoning"})

T = TypeVar("T")


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
        for position, item in enumerate(listed):
            index = item.get("index")
            by_index.setdefault(index if type(index) is int else position, item)
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
    reasoning = _reasoning(message.get("reasoning_content") or message.get("reasoning")) or thought
    reason = choice.get("finish_reason")
    named = reason.lower() if isinstance(reason, str) else ""
    ended = f"finish_reason {received.shown(repr(reason))}"
    if named in WITHHELD or refusal or message.get("refusal"):
        return Fault(
            "content_filter",
            f"{ended}: the server or the model refuses the answer",
            is_refusal=True,
        )
    if named not in COMPLETE | AT_LIMIT or choice.get("error"):
        problem = (
            f" and an error: {received.shown(repr(choice['error']))}" if choice.get("error") else ""
        )
        return Fault(
            "unfinished",
            f"{ended}{problem}, expected 'stop' or 'length'",
            is_of_model=named in NO_ANSWER,
        )
    if not (content or reasoning or has_token_ids):
        why = (
            "; the limit may have come in a reasoning that the server does not show"
            if named in AT_LIMIT
            else ""
        )
        return Fault("empty_choice", f"no text, {ended}{why}", is_of_model=True)
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


def _reasoning(content: Any) -> str:
    """Return a reasoning of its own field, whatever its parts are called; empty for none."""
    if not isinstance(content, list):
        return _checked(content, str) if content is not None else ""
    parts = [
        part if isinstance(part, str) else part.get("thinking") or part.get("text") or ""
        for part in content
    ]
    return "".join(map(_reasoning, parts))


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _tokens(
    choice: Mapping[str, Any], num_top: int | None, received: ReceivedText
) -> tuple[ServedToken, ...]:
    """Return an answer's tokens; none if they cannot be read, which keeps the answer."""
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
    """Return a token's bytes; part of a character has no text, so servers list bytes."""
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

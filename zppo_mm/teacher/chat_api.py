"""What is said to an OpenAI-compatible server, and what comes back: request bodies, replies, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.question import MediaRef
from zppo_mm.experience import FinishReason

Content = str | Sequence[Mapping[str, Any]]
"""Content of a user message: a text, or parts with media first."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One user message and how often it is to be answered.

    Attributes:
        text: Of the message.
        num_choices: Answers wanted.
        temperature: 0 is greedy.
        max_tokens: Longest answer.
        seed: Names the server's random stream; answer i asked on its own has `seed + i`.
        top_logprobs: Most likely tokens that are to come with every token of the answers; 0 asks for no log-probs.
        media: What the message shows, in order. They are opened when its turn comes, so that those of waiting messages take no memory.
    """

    text: str
    num_choices: int
    temperature: float
    max_tokens: int
    seed: int
    top_logprobs: int = 0
    media: tuple[MediaRef, ...] = ()

    def body(self, model: str, content: Content, num_choices: int, first: int) -> bytes:
        """Return the JSON request that asks a content for `num_choices` answers from answer `first` on."""
        request: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "top_p": 1.0,
            "max_tokens": self.max_tokens,
            "seed": (self.seed + first) % 2**31,
            "stream": False,
        }
        if num_choices > 1:
            request["n"] = num_choices
        if self.top_logprobs:
            request |= {"logprobs": True, "top_logprobs": self.top_logprobs}
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
        text: All that the model wrote: a reasoning that the server tells apart comes first, inside `<think>` tags.
        finish_reason: `length` if it met the limit.
        content: The text without a reasoning that the server tells apart.
        tokens: What the model wrote, token by token, reasoning and markup included; empty if the server tells no log-probs.
    """

    text: str
    finish_reason: FinishReason
    content: str
    tokens: tuple[ServedToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply.

    Attributes:
        choices: Answers that have a text, at most as many as were asked for.
        num_returned: Answers returned, empty ones included.
        prompt_tokens: As the server counts them; 0 if it does not.
        completion_tokens: The same of all answers together.
    """

    choices: tuple[Choice, ...]
    num_returned: int
    prompt_tokens: int
    completion_tokens: int


class Fault(Exception):
    """One attempt failed.

    Attributes:
        kind: Fixed name to count by: connection, timeout, cut_off, bad_reply, empty_choice, http_<status>.
        detail: In words.
        retry_after_seconds: How long the server asks to be left alone.
        is_refusal: The message itself is at fault, and another attempt would fail as well.
    """

    def __init__(self, kind: str, detail: str, retry_after_seconds: float | None = None, is_refusal: bool = False) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        self.is_refusal = is_refusal

    def __reduce__(self) -> tuple[type[Fault], tuple[str, str, float | None, bool]]:
        return type(self), (self.kind, self.detail, self.retry_after_seconds, self.is_refusal)


def parse_reply(body: bytes, num_choices: int) -> Reply:
    """Read a chat completion.

    Args:
        body: The whole response.
        num_choices: Answers asked for; surplus ones are dropped.

    Raises:
        Fault: It is not a chat completion (`bad_reply`), or none of its answers has a text (`empty_choice`).
    """
    try:
        reply = json.loads(body)
        listed = reply["choices"]
        usage = reply.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        # A choice is known by its index: one that a server repeats must not count twice.
        by_index = {choice.get("index", place): _choice(choice) for place, choice in enumerate(listed)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault("bad_reply", f"not a chat completion ({type(error).__name__}: {error}), got {body[:80]!r}") from error
    choices = [choice for choice in list(by_index.values())[:num_choices] if choice.text]
    if not choices:
        raise Fault("empty_choice", f"{len(listed)} choices, none of them with a text")
    return Reply(tuple(choices), len(listed), counts[0], counts[1])


def _choice(choice: Mapping[str, Any]) -> Choice:
    message = choice["message"]
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not (isinstance(content, str) and isinstance(reasoning, str)):
        raise TypeError(f"content is no text, got {type(content).__name__}")
    text = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}" if reasoning else content
    tokens = tuple(_token(item) for item in (choice.get("logprobs") or {}).get("content") or ())
    return Choice(text, "length" if choice.get("finish_reason") == "length" else "stop", content, tokens)


def _token(item: Mapping[str, Any]) -> ServedToken:
    top = tuple((_spelling(each), float(each["logprob"])) for each in item.get("top_logprobs") or ())
    return ServedToken(_spelling(item), float(item["logprob"]), top)


def _spelling(item: Mapping[str, Any]) -> bytes:
    """Return a token's bytes; part of a character has no text, so servers tell them apart."""
    listed = item.get("bytes")
    return bytes(listed) if listed is not None else str(item["token"]).encode("utf-8", errors="backslashreplace")

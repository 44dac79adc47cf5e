"""Requests to an OpenAI-compatible server, and the parts of a reply."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data.question import MediaRef, Turn
from zppo_mm.experience import FinishReason, FloatArray, IntArray

# No reply to a good request is longer: room for what stands around the answers, and for the JSON of
# one token, or of one listed log-prob.
BASE_REPLY_BYTES = 2**20
TOKEN_BYTES = 256
# Between the seeds of one answer's draws; no message has more answers.
DRAW_SEEDS = 2**20

Messages = Sequence[Mapping[str, Any]]
"""Of a conversation: roles, and contents that are a text or parts."""


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
class ChatRequest:
    """A conversation and how often it is to be answered.

    Attributes:
        text: Of the last message, the user's.
        num_choices: Answers wanted.
        temperature: 0 is greedy.
        max_tokens: Longest answer.
        seed: Names the server's random stream; answer i asked on its own has `seed + i`, and other
            ones when it is drawn again.
        top_logprobs: Most likely tokens that are to come with every token of the answers; 0 asks
            for no log-probs.
        media: What the messages show, in order. They are opened when its turn comes, so that those
            of waiting messages take no memory.
        earlier: Messages before the last.
        stream: Random stream, as `GroupSampler` names it: `rollout` or `respond`, and a name.
        batch: Set for the server of `chat_server` alone, which reads the stream, the batch and
            references to the media, and returns the tokens.
        chat_template_kwargs: Variables of the model's chat template.
        needs_template_kwargs: Whether a server that refuses them is not to be asked without.
    """

    text: str
    num_choices: int
    temperature: float
    max_tokens: int
    seed: int
    top_logprobs: int = 0
    media: tuple[MediaRef, ...] = ()
    earlier: tuple[Turn, ...] = ()
    stream: tuple[str, ...] = ()
    batch: Batch | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    needs_template_kwargs: bool = True

    def max_reply_bytes(self, num_choices: int) -> int:
        """Return what the reply to a request for `num_choices` answers may take, decoded."""
        listed = 2 + self.top_logprobs if self.top_logprobs else 1
        return BASE_REPLY_BYTES + num_choices * self.max_tokens * TOKEN_BYTES * listed

    def body(
        self, model: str, messages: Messages, num_choices: int, first: int, draw: int = 0
    ) -> bytes:
        """Return the JSON request that asks messages for `num_choices` answers from answer `first`
        on; each `draw` has other seeds.
        """
        request: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
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
        if self.chat_template_kwargs:
            request["chat_template_kwargs"] = dict(self.chat_template_kwargs)
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
        top: Spelling and log-prob of the most likely tokens at its position.
    """

    spelling: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer.

    Attributes:
        text: All that the model wrote. A reasoning that the server separates comes first, after
            `<think>`, and is closed only if something follows it.
        finish_reason: `length` if it met the limit.
        content: The text without a reasoning that the server separates.
        tokens: What the model wrote, token by token, reasoning and markup included; empty if the
            server sends no log-probs.
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

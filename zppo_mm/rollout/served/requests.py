"""What a vLLM server is asked: a prompt's tokens and media, and how to continue them.

Source: vLLM 0.32, `entrypoints/scale_out/token_in_token_out/protocol.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zppo_mm.experience import IntArray
from zppo_mm.rollout.engine import Generation, SamplingParams
from zppo_mm.rollout.served.features import MediaItem, features
from zppo_mm.rollout.served.replies import Expected, parse_reply
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText

GENERATE_PATH = "/inference/v1/generate"
NO_ROUTE = (
    "; it has no such route, expected vLLM of at least 0.32, started with --enable-scale-out, and "
    "with VLLM_SERVER_DEV_MODE=1 to be sent weights (docs/serving.md)"
)
MAX_MISSING = 2
"""Replies that say so, after which a prompt is not asked again: something before a server may say
it once.
"""
MAX_BIAS = 100.0
"""Largest bias of a logit that vLLM takes."""
BASE_REPLY_BYTES = 2**20
TOKEN_BYTES = 192
"""Of one token in a reply, and of each token that is listed with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """A prompt to be continued several times by one HTTP request, which is answered whole or not
    at all.

    Attributes:
        token_ids: `[prompt]`.
        media: Of the prompt.
        num_rollouts: Continuations.
        seed: Of the first; each further one has the next.
        sampling: How tokens are drawn.
        forbidden_ids: Tokens that are never drawn.
        vocabulary: Tokens that the network has.
        run: Names the run in the versions of its weights; empty asks for no versions.
        versions: Those whose weights may draw.
        adapter: Name of the adapters that draw; empty for the network without.
        may_be_refused: Whether prompt and longest response are more than the servers have to take.
    """

    token_ids: IntArray
    media: tuple[MediaItem, ...]
    num_rollouts: int
    seed: int
    sampling: SamplingParams
    forbidden_ids: tuple[int, ...]
    vocabulary: int
    run: str = ""
    versions: range = range(0)
    adapter: str = ""
    may_be_refused: bool = False

    def max_reply_bytes(self) -> int:
        """Return what a reply may take, decoded."""
        num_listed = 3 + len(self.forbidden_ids)
        tokens = self._num_draws() * self.sampling.max_new_tokens
        return BASE_REPLY_BYTES + tokens * TOKEN_BYTES * num_listed

    def read(self, content: bytes, received: ReceivedText) -> tuple[Generation, ...]:
        """Return the continuations of a reply.

        Raises:
            Fault: It is not what was asked for.
        """
        drawn = parse_reply(content, self._expected(), received)
        return drawn * (self.num_rollouts // len(drawn))

    def body(self) -> bytes:
        """Return the JSON request."""
        request: dict[str, Any] = {
            "token_ids": self.token_ids.tolist(),
            "sampling_params": self._sampling_params(),
            "stream": False,
        }
        if self.adapter:
            request["model"] = self.adapter
        if self.media:
            request["features"] = features(self.media)
        return json.dumps(request).encode()

    def _num_draws(self) -> int:
        """Return how many are asked for; several greedy ones are a mistake to vLLM."""
        return self.num_rollouts if self.sampling.temperature else 1

    def _expected(self) -> Expected:
        """Return what a usable reply holds."""
        return Expected(
            num_rollouts=self._num_draws(),
            max_new_tokens=self.sampling.max_new_tokens,
            stop_token_ids=self.sampling.stop_token_ids,
            forbidden_ids=self.forbidden_ids,
            vocabulary=self.vocabulary,
            forbidden_bias=self._bias() / self._divisor(),
            run=self.run,
            versions=self.versions,
        )

    def _divisor(self) -> float:
        """Return what the logits are divided by."""
        return self.sampling.temperature or 1.0

    def _bias(self) -> float:
        """Return the bias of the logits of what is never drawn: after the division no less than
        vLLM can send back.
        """
        return -MAX_BIAS * min(1.0, self._divisor())

    def _sampling_params(self) -> Mapping[str, Any]:
        sampling = self.sampling
        params: dict[str, Any] = {
            "n": self._num_draws(),
            "seed": self.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            # The folder's own end token, which the server knows, need not be one of these.
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            "skip_special_tokens": False,
        }
        if self.forbidden_ids:
            params["logit_bias"] = {str(token): self._bias() for token in self.forbidden_ids}
            # Their log-probs come with every token, to undo what the bias did to the others'. vLLM
            # lists as many as are asked for with the drawn one first, so one is named twice.
            named = [*self.forbidden_ids, self.forbidden_ids[-1]]
            params["logprob_token_ids"] = named
            params["logprobs"] = len(named)
        return params


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A request on its way to a server. Implements `Call`.

    Attributes:
        request: The prompt.
        received: Makes the reply's texts fit to be shown.
    """

    request: ServedRequest
    received: ReceivedText
    path = GENERATE_PATH

    @property
    def max_reply_bytes(self) -> int:
        """Longest reply, decoded."""
        return self.request.max_reply_bytes()

    @property
    def is_greedy(self) -> bool:
        """Whether another draw is the same."""
        return not self.request.sampling.temperature

    async def body(self, draw: int) -> bytes:
        """Return the request; a draw is not repeated with another seed."""
        # Media would hold up the other requests of the loop.
        if self.request.media:
            return await asyncio.to_thread(self.request.body)
        return self.request.body()

    def read(self, content: bytes) -> tuple[Generation, ...]:
        """Return the continuations of a reply."""
        return self.request.read(content, self.received)

    def is_settled_by(self, fault: Fault, kinds: Mapping[str, int]) -> bool:
        """Return whether no server has the route."""
        return kinds["http_404"] >= MAX_MISSING

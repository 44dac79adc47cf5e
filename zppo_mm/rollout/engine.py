"""What a sampling engine promises. Requests and results are local to one model replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from encoders.processor import VisionInput
from zppo_mm.experience import FinishReason, FloatArray, IntArray, Prompt

MAX_LOGPROB = 1e-4
"""Largest log-prob of a token, above 0 by what the rounding of a softmax may add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: 0 means greedy.
        top_p: Nucleus mass; 1 keeps everything.
        top_k: 0 keeps everything.
        min_p: Least probability as a fraction of the most likely token's; 0 keeps everything.
        presence_penalty: Subtracted from the logit of every token already in the response.
        max_new_tokens: Longest response; the stop token counts.
        stop_token_ids: Any of these ends a response and belongs to it.
    """

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to be continued several times.

    Attributes:
        prompt: Tokens and positions.
        vision: Its media, processed once for all its rollouts; empty off the first pipeline stage
            is allowed.
        num_rollouts: Continuations wanted.
        seed_path: Names the random streams; rollout i draws from `generator(seed, *seed_path, i)`.
    """

    prompt: Prompt
    vision: tuple[VisionInput, ...]
    num_rollouts: int
    seed_path: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Consecutive tokens of a response that the same weights drew.

    Attributes:
        version: Rollout step that samples with these weights when it is on-policy.
        num_tokens: Tokens drawn with them.
    """

    version: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation: `response_ids` and `rollout_logprobs` are `[response]`.

    Attributes:
        is_broken: Whether the logits after these tokens were not finite, so that nothing could be
            drawn from them; the finish reason means nothing then.
        num_preemptions: How often it had to make room for others and was computed again.
        versions: Which weights drew its tokens, in order; empty if the engine has no others than
            the trained network's.
    """

    response_ids: IntArray
    rollout_logprobs: FloatArray
    finish_reason: FinishReason
    is_broken: bool = False
    num_preemptions: int = 0
    versions: tuple[VersionSpan, ...] = ()

    @property
    def num_sound_tokens(self) -> int | None:
        """Tokens before the first that no sound network can have drawn; `None` if all are sound."""
        # Beyond 0 is what the rounding of a softmax may give.
        sound = np.isfinite(self.rollout_logprobs) & (self.rollout_logprobs <= MAX_LOGPROB)
        if not sound.all():
            return int(np.argmin(sound))
        return len(self.response_ids) if self.is_broken else None


class RolloutEngine(Protocol):
    """Continues prompts with one model; every rank of a replica calls with the same requests and
    gets the same results.
    """

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        """Return `num_rollouts` continuations per request, in the order of the requests.

        The draw depends only on the weights, the prompt and the seed path, never on what else is in
        the batch. Nothing is drawn from logits that are not finite: the continuation ends before
        that token and is broken.
        """
        ...


class PendingGenerations(Protocol):
    """Continuations that are being sampled."""

    def wait(self) -> list[list[Generation]]:
        """Return what `RolloutEngine.generate` returns; every rank of the replica calls this."""
        ...

    def cancel(self) -> None:
        """Drop what is under way."""
        ...


class ServedEngine(RolloutEngine, Protocol):
    """Samples elsewhere, with weights that it is sent, while the ranks do other things."""

    def start(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> PendingGenerations:
        """Start what `generate` does, with the weights that the engine has now."""
        ...

    def update_weights(self, version: int) -> None:
        """Send the trained network's present weights; every rank of every replica calls this.

        Args:
            version: Rollout step that samples with them when it is on-policy. Nothing is done if
                the engine has that version already.
        """
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...

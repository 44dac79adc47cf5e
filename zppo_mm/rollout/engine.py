"""What a sampling engine promises. Requests and results are local to one model replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from encoders.processor import VisionInput
from zppo_mm.experience import FinishReason, FloatArray, IntArray, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: 0 means greedy.
        top_p: Nucleus mass; 1 keeps everything.
        top_k: 0 keeps everything.
        min_p: Least probability as a share of the most likely token's; 0 keeps everything.
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
        vision: Its media, processed once for all its rollouts; empty off the first pipeline stage is allowed.
        num_rollouts: Continuations wanted.
        seed_path: Names the random streams; rollout i draws from `generator(seed, *seed_path, i)`.
    """

    prompt: Prompt
    vision: tuple[VisionInput, ...]
    num_rollouts: int
    seed_path: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation: `response_ids` and `rollout_logprobs` are `[response]`."""

    response_ids: IntArray
    rollout_logprobs: FloatArray
    finish_reason: FinishReason


class RolloutEngine(Protocol):
    """Continues prompts with one model; every rank of a replica calls with the same requests and gets the same results."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[list[Generation]]:
        """Return `num_rollouts` continuations per request, in the order of the requests.

        The draw depends only on the weights, the prompt and the seed path, never on what else is in the batch.
        """
        ...

"""Which rollouts join the batch, and which have to leave it for a while."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from zppo_mm.experience import FloatArray, IntArray
from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.rollout.engine import GenerationRequest

NO_IDS: IntArray = np.zeros(0, np.int64)
NO_LOGPROBS: FloatArray = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Rollouts of one request that join the batch together.

    Attributes:
        request: Index of the request.
        rollouts: Their numbers.
        response_ids: What the only one had sampled before it was preempted; empty otherwise.
        rollout_logprobs: Like `response_ids`.
    """

    request: int
    rollouts: tuple[int, ...]
    response_ids: IntArray
    rollout_logprobs: FloatArray


class AdmissionQueue:
    """Rollouts that wait: preempted ones first, the oldest before the others, then new ones from
    the longest prompt to the shortest, those of a prompt together.

    Every rank of a replica comes to the same decisions, from lengths and counts alone.

    Args:
        requests: All requests.
        max_batch_size: Most rows of the batch.
        max_prefill_tokens: Most tokens of one prefill; a single longer sequence goes alone.
        max_prefill_patches: Most patches of media of one prefill; a prompt with more goes alone.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        max_batch_size: int,
        max_prefill_tokens: int,
        max_prefill_patches: int = sys.maxsize,
    ) -> None:
        self._requests = requests
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._max_prefill_patches = max_prefill_patches
        order = sorted(
            range(len(requests)), key=lambda index: (-len(requests[index].prompt.token_ids), index)
        )
        self._waiting = deque(
            Candidate(
                index,
                tuple(range(requests[index].num_rollouts))[first : first + max_batch_size],
                NO_IDS,
                NO_LOGPROBS,
            )
            for index in order
            for first in range(0, requests[index].num_rollouts, max_batch_size)
        )

    def __len__(self) -> int:
        return len(self._waiting)

    def put_back(self, candidate: Candidate) -> None:
        """Let a preempted rollout wait before all others: it is older than they are."""
        self._waiting.appendleft(candidate)

    def take(self, cache: DecodeCache) -> list[Candidate]:
        """Take the next ones, in order, as long as they find rows, blocks, and room in one prefill.

        Blocks are left for the next token of every row, so that nothing is preempted at once. An
        empty batch takes something in any case, if need be a part of a prompt's rollouts.
        """
        taken: list[Candidate] = []
        rows, blocks, num_tokens, num_patches = cache.batch_size, cache.num_free_blocks, 0, 0
        prompts: set[int] = set()
        while self._waiting:
            candidate = self._waiting[0]
            prompt = self._requests[candidate.request].prompt
            length, own = len(prompt.token_ids), len(candidate.response_ids)
            num_tokens += length + own
            num_patches += sum(map(math.prod, prompt.grids))
            exceeds = (
                num_tokens > self._max_prefill_tokens or num_patches > self._max_prefill_patches
            )
            if rows + len(candidate.rollouts) > self._max_batch_size or (taken and exceeds):
                break
            is_held = candidate.request in prompts or cache.holds(candidate.request)
            needed = cache.blocks_of(own) + (0 if is_held else cache.blocks_of(length))
            fitting = blocks - needed - rows
            if fitting < len(candidate.rollouts):
                if rows:
                    break
                candidate = self._split(max(fitting, 1))
            self._waiting.popleft()
            taken.append(candidate)
            prompts.add(candidate.request)
            rows, blocks = rows + len(candidate.rollouts), blocks - needed
        return taken

    def _split(self, count: int) -> Candidate:
        """Divide the first that waits; returns its first part."""
        whole = self._waiting[0]
        first, rest = (
            replace(whole, rollouts=part)
            for part in (whole.rollouts[:count], whole.rollouts[count:])
        )
        if rest.rollouts:
            self._waiting[0] = rest
            self._waiting.appendleft(first)
        return first

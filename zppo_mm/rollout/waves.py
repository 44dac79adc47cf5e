"""Which sequences are decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zppo_mm.rollout.engine import GenerationRequest


@dataclass(frozen=True, slots=True)
class RequestPart:
    """Rollouts of one request inside a wave: `first` to `first + count - 1`."""

    request: int
    first: int
    count: int


def plan_waves(
    requests: Sequence[GenerationRequest], max_batch_size: int, max_prefill_tokens: int
) -> list[list[RequestPart]]:
    """Group requests of similar prompt length, a group whole where it fits, into waves that are
    decoded one after another.

    Args:
        requests: All requests.
        max_batch_size: Most sequences of a wave.
        max_prefill_tokens: Most prompt tokens of a wave; a single longer prompt goes alone.
    """
    order = sorted(
        range(len(requests)), key=lambda index: (-len(requests[index].prompt.token_ids), index)
    )
    waves: list[list[RequestPart]] = []
    size = tokens = 0
    for index in order:
        length = len(requests[index].prompt.token_ids)
        for first in range(0, requests[index].num_rollouts, max_batch_size):
            count = min(max_batch_size, requests[index].num_rollouts - first)
            if not waves or size + count > max_batch_size or tokens + length > max_prefill_tokens:
                waves.append([])
                size = tokens = 0
            waves[-1].append(RequestPart(index, first, count))
            size, tokens = size + count, tokens + length
    return waves

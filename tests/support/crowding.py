"""Sampling with so small a decoding cache that sequences have to make room for others, and the
log-probs to compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from zppo_mm.models.decoding.cache_size import CacheSize
from zppo_mm.rollout.engine import Generation, GenerationRequest
from zppo_mm.rollout.megatron_engine import MegatronEngine

SMALL_BLOCK, SPARE_BLOCKS, MAX_ROWS = 4, 6, 12


def crowded(
    network: Any, seed: int, requests: list[GenerationRequest], new_tokens: int
) -> MegatronEngine:
    """Return an engine whose cache has room for one of the longest sequences and little more."""
    config = network.config
    layout = (config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    size = CacheSize.of(network.architecture, *layout, config.params_dtype.itemsize, SMALL_BLOCK)
    longest = max(len(each.prompt.token_ids) for each in requests)
    num_blocks = size.blocks_of(longest) + size.blocks_of(new_tokens) + SPARE_BLOCKS
    budget = size.num_bytes(num_blocks, MAX_ROWS)
    return MegatronEngine(network, seed, MAX_ROWS, cache_bytes=budget, slots_per_block=SMALL_BLOCK)


@torch.no_grad()
def forward_logprobs(
    network: torch.nn.Module, item: GenerationRequest, generation: Generation
) -> np.ndarray:
    """Log-probs of a response by the packed training forward pass."""
    start, length = len(item.prompt.token_ids), len(generation.response_ids)
    tokens = torch.from_numpy(np.concatenate([item.prompt.token_ids, generation.response_ids]))
    answer = torch.arange(item.prompt.next_position, item.prompt.next_position + length).expand(
        3, -1
    )
    positions = torch.cat([torch.from_numpy(item.prompt.positions), answer], dim=1)
    patches = (
        torch.from_numpy(np.concatenate([media.patches for media in item.vision]))
        if item.vision
        else None
    )
    grids = torch.tensor([media.grid for media in item.vision]) if item.vision else None
    logits = network(
        tokens, positions, torch.tensor([0, len(tokens)], dtype=torch.int32), patches, grids
    )
    logprobs = torch.log_softmax(logits[start - 1 : -1], dim=-1)
    return logprobs.gather(1, tokens[start:, None]).squeeze(1).numpy()

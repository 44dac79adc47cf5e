"""Attention of packed sequences in bfloat16 against float32 on the same values."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from zppo_mm.models.layers.attention import MAX_CAST_TOKENS_CPU, PackedAttention
from zppo_mm.models.layers.packing import build_layout

HEADS, GROUPS, DIM = 4, 2, 16


def mix(
    heads: list[torch.Tensor], lengths: list[int], parents: list[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return the result and the gradients of queries, keys and values, all computed in a type."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS
    )
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    leaves = [each.detach().to(dtype).requires_grad_() for each in heads]
    result = PackedAttention(config, 1)(
        *leaves, packed_seq_params=build_layout(bounds, parents=parents)
    )
    upstream = torch.linspace(-1, 1, result.numel()).view_as(result).to(torch.bfloat16)
    result.backward(upstream.to(dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("parents", [[-1, -1, -1], [-1, 0, 0]])
def test_short_sequences_in_bfloat16_are_only_rounded_at_the_end(parents: list[int]) -> None:
    lengths = [MAX_CAST_TOKENS_CPU, 20, 100]
    random = torch.Generator().manual_seed(0)
    heads = [
        torch.randn(sum(lengths), count, DIM, generator=random).bfloat16()
        for count in (HEADS, GROUPS, GROUPS)
    ]
    result, *gradients = mix(heads, lengths, parents, torch.bfloat16)
    expected, *expected_gradients = mix(heads, lengths, parents, torch.float32)
    assert torch.equal(result, expected.bfloat16())
    assert len(gradients) == 3
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        # What several children add to a parent's keys is added in bfloat16.
        scale = float(theirs.abs().max())
        assert float((ours.float() - theirs).abs().max()) <= 2**-7 * scale

"""Full attention over packed sequences, with an output gate where the group has one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from zppo_mm.models.layers.packing import PackedLayout
from zppo_mm.models.layers.rotary import rotate

MAX_CAST_TOKENS_CPU = 128
"""Up to so many tokens of a sequence, torch's bfloat16 kernel for the CPU takes longer, with its
backward pass, than its float32 kernel on casts.
"""


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of packed sequences through torch's kernel, batched over sequences of
    similar length.

    megatron-core's local attention refuses packed sequences. Padding follows every sequence,
    which a causal token never attends to. Children are batched by parent, each with a copy of the
    parent's keys and values: no child is held against another one's tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedLayout,
        **_: Any,
    ) -> torch.Tensor:
        """Attend inside each sequence, and from a child to its parent.

        Args:
            query: `[tokens, heads, head_dim]`.
            key: `[tokens, groups, head_dim]`.
            value: `[tokens, groups, head_dim]`.
            attention_mask: Unused.
            packed_seq_params: Bounds and buckets of the sequences.

        Returns:
            `[tokens, heads * head_dim]`.
        """
        parts = []
        for bucket in packed_seq_params.buckets:
            parts.append(
                bucket.unpad(self._mix(*(bucket.pad(heads) for heads in (query, key, value))))
            )
        if packed_seq_params.branches:
            # Splitting has one backward pass for all sequences; indexing would fill a whole
            # gradient tensor with zeros for each.
            keys, values = (
                torch.split(heads, list(packed_seq_params.lengths)) for heads in (key, value)
            )
        for branch in packed_seq_params.branches:
            counts = [group.num_children for group in branch.child_groups]
            own = zip(
                branch.child_groups,
                *(torch.split(branch.bucket.pad(heads), counts) for heads in (query, key, value)),
                strict=True,
            )
            mixed = [
                self._mix(
                    q, _after(keys[group.parent], k), _after(values[group.parent], v), group.mask
                )
                for group, q, k, v in own
            ]
            parts.append(branch.bucket.unpad(torch.cat(mixed)))
        return packed_seq_params.join(parts).flatten(1)

    def _mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend inside every sequence of `[batch, length, heads, head_dim]`, causally if no mask
        says otherwise.
        """
        q, k, v = (heads.transpose(1, 2) for heads in (query, key, value))
        if _takes_less_in_float32(q):
            q, k, v = q.float(), k.float(), v.float()
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return mixed.transpose(1, 2).to(query.dtype)


def _takes_less_in_float32(queries: torch.Tensor) -> bool:
    is_short = queries.shape[2] <= MAX_CAST_TOKENS_CPU
    return queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and is_short


def _after(parent: torch.Tensor, children: torch.Tensor) -> torch.Tensor:
    """Set `[parent's tokens, ...]` before each of `[children, longest, ...]`."""
    return torch.cat([parent.expand(len(children), *parent.shape), children], 1)


class PackedSelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention, for packed sequences and prefill.

    The forward pass replaces megatron-core's, whose packed rotary embedding recomputes the tables
    in every layer.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: PackedLayout,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix tokens of each sequence.

        Args:
            hidden_states: `[tokens, 1, hidden]`; part of the tokens under sequence or context
                parallelism.
            attention_mask: Unused.
            rotary_pos_emb: `[2, tokens, 1, rotated channels]` cosines and sines; this rank's part
                under context parallelism.
            packed_seq_params: Bounds of the sequences in the whole pack, and the cache that a
                prefill fills.

        Returns:
            Output like `hidden_states`, and no bias.
        """
        gated = self.config.attention_output_gate
        query, key, value, *gate = self.get_query_key_value_tensors(
            hidden_states, None, output_gate=gated, split_qkv=True
        )
        query = rotate(query.squeeze(1), rotary_pos_emb)
        key = rotate(key.squeeze(1), rotary_pos_emb)
        value = value.squeeze(1)
        if packed_seq_params.cache is not None:
            packed_seq_params.cache.store_attention(self.layer_number, key, value)
        exchange = packed_seq_params.exchange
        if exchange is not None:
            query, key, value = exchange.to_heads((query, key, value))
        if self.checkpoint_core_attention and self.training:
            mixed = self._checkpointed_attention_forward(
                query,
                key,
                value,
                None,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
            )
        else:
            mixed = self.core_attention(query, key, value, packed_seq_params=packed_seq_params)
        if exchange is not None:
            mixed = exchange.to_tokens(mixed)
        mixed = mixed.reshape(len(mixed), 1, -1)
        if gated:
            mixed = mixed * torch.sigmoid(gate[0].reshape(len(mixed), 1, -1))
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_proj(mixed)
        return output

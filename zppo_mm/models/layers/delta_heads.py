"""The layout of a Gated DeltaNet layer's heads in its projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Heads and widths on one rank.

    Attributes:
        key_heads: Linear key heads, and as many query heads.
        value_heads: Value heads.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def qkv(self) -> list[int]:
        """Widths of query, key and value, which the convolution mixes over time."""
        return [self.key_heads * self.key_dim] * 2 + [self.value_heads * self.value_dim]

    @property
    def projection(self) -> list[int]:
        """Widths of query, key, value, gate, beta and alpha in the input projection."""
        return [*self.qkv, self.value_heads * self.value_dim, self.value_heads, self.value_heads]


@dataclass(frozen=True, slots=True)
class MixingHeads:
    """The heads whose tokens this rank mixes, with their parameters: all of the tensor rank's, or a
    context rank's part of them.

    Attributes:
        layout: Numbers and widths.
        convolution: `[channels, 1, taps]`.
        decay: `[value_heads]` the layer's `A_log`.
        decay_bias: `[value_heads]` the layer's `dt_bias`.
    """

    layout: HeadLayout
    convolution: torch.Tensor
    decay: torch.Tensor
    decay_bias: torch.Tensor

    def split(self, channels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split `[..., channels]` into `[..., heads, dim]` of query, key and value."""
        query, key, value = torch.split(channels, self.layout.qkv, dim=-1)
        key_heads, value_heads = self.layout.key_heads, self.layout.value_heads
        query, key = (heads.reshape(*heads.shape[:-1], key_heads, -1) for heads in (query, key))
        return query, key, value.reshape(*value.shape[:-1], value_heads, -1)

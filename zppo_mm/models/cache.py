"""What decoding remembers of every sequence: rotated keys, values, and the states of the DeltaNet layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class AttentionState:
    """Keys and values of one attention layer, `[batch, groups, slots, head_dim]`; a sequence ends at the last used slot."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(slots=True)
class LinearState:
    """State of one DeltaNet layer.

    Attributes:
        inputs: `[batch, taps, channels]` last inputs of the convolution, a ring; the next one goes to the slot of the cache's step.
        state: `[batch, value_heads, key_dim, value_dim]` float32.
    """

    inputs: torch.Tensor
    state: torch.Tensor


@dataclass(slots=True)
class DecodeCache:
    """State of a batch of sequences on this pipeline stage.

    Sequences are aligned at their ends: the tokens of one decoding step all go to the same slot, so writing is one copy and only the
    empty slots before short sequences are masked.

    Attributes:
        max_new_tokens: Tokens that will be decoded at most, over all calls.
        starts: First used slot of every sequence; empty before the prefill.
        used: Slots used so far.
        step: Tokens decoded so far.
        mask: `[batch, 1, 1, slots]`, 0 where a sequence has a token and minus infinity before its start; `None` if all start at 0.
        attention: Per attention layer, by its global number.
        linear: Per DeltaNet layer, by its global number.
        plan: Weights as the decoding loop wants them, set by the prefill.
    """

    max_new_tokens: int
    starts: list[int] = field(default_factory=list)
    used: int = 0
    step: int = 0
    mask: torch.Tensor | None = None
    attention: dict[int, AttentionState] = field(default_factory=dict)
    linear: dict[int, LinearState] = field(default_factory=dict)
    plan: Any = None
    _slots: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.starts)

    def begin(self, cu_seqlens: torch.Tensor, dtype: torch.dtype) -> None:
        """Make room for packed prompts.

        Args:
            cu_seqlens: `[sequences + 1]`.
            dtype: Of the mask, the network's.
        """
        assert not self.starts, "a cache is filled by one prefill"
        lengths = cu_seqlens.diff().cpu()
        self.used = int(lengths.max())
        starts = self.used - lengths
        self.starts = starts.tolist()
        places = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        rows = torch.arange(len(lengths)) * self.used + starts
        self._slots = (torch.repeat_interleave(rows, lengths) + places).to(cu_seqlens.device)
        self._make_mask(cu_seqlens.device, dtype)

    def store_attention(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's keys and values of packed prompts, each `[tokens, groups, head_dim]`."""
        assert self._slots is not None, "begin comes first"
        self.attention[layer] = AttentionState(self._aligned(key), self._aligned(value))

    def store_linear(self, layer: int, sequences: Sequence[int], inputs: torch.Tensor, state: torch.Tensor) -> None:
        """Keep a DeltaNet layer's state after some of the prompts.

        Args:
            layer: Global number.
            sequences: Places of the prompts in the batch.
            inputs: `[sequences, taps - 1, channels]` last inputs of the convolution.
            state: `[sequences, value_heads, key_dim, value_dim]`.
        """
        if layer not in self.linear:
            ring = inputs.new_zeros((self.batch_size, inputs.shape[1] + 1, inputs.shape[2]))
            self.linear[layer] = LinearState(ring, state.new_zeros((self.batch_size, *state.shape[1:])))
        rows = torch.tensor(sequences, device=inputs.device)
        self.linear[layer].inputs[rows, : inputs.shape[1]] = inputs
        self.linear[layer].state[rows] = state

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences that `index` names, in its order; a place may come several times or not at all.

        Args:
            index: `[new batch]` int64 on the network's device.
        """
        places = index.tolist()
        starts = [self.starts[place] for place in places]
        unused = min(starts, default=0)
        self.starts = [start - unused for start in starts]
        capacity = self.used - unused + self.max_new_tokens - self.step
        for layer in self.attention.values():
            layer.keys = self._moved(layer.keys, index, unused, capacity)
            layer.values = self._moved(layer.values, index, unused, capacity)
        for state in self.linear.values():
            state.inputs, state.state = state.inputs.index_select(0, index), state.state.index_select(0, index)
        self.used -= unused
        if self.mask is not None:
            self._make_mask(index.device, self.mask.dtype)

    def reserve(self) -> None:
        """Make room for the tokens to be decoded, unless a selection already did."""
        first = next(iter(self.attention.values()), None)
        if first is not None and first.keys.shape[2] < self.used + self.max_new_tokens - self.step:
            self.select(torch.arange(self.batch_size, device=first.keys.device))

    def _aligned(self, packed: torch.Tensor) -> torch.Tensor:
        assert self._slots is not None
        rows = packed.new_zeros((self.batch_size * self.used, *packed.shape[1:])).index_copy_(0, self._slots, packed)
        return rows.view(self.batch_size, self.used, *packed.shape[1:]).transpose(1, 2).contiguous()

    def _moved(self, slots: torch.Tensor, index: torch.Tensor, unused: int, capacity: int) -> torch.Tensor:
        moved = slots.new_empty((len(index), slots.shape[1], capacity, slots.shape[3]))
        moved[:, :, : self.used - unused] = slots[:, :, unused : self.used].index_select(0, index)
        return moved

    def _make_mask(self, device: torch.device, dtype: torch.dtype) -> None:
        if not any(self.starts):
            self.mask = None
            return
        slots = self.used + self.max_new_tokens - self.step
        empty = torch.arange(slots, device=device) < torch.tensor(self.starts, device=device)[:, None]
        self.mask = torch.zeros(empty.shape, device=device, dtype=dtype).masked_fill_(empty, float("-inf"))[:, None, None]

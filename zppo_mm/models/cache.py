"""What decoding remembers of every sequence: rotated keys, values, and the states of the DeltaNet layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zppo_mm.models.shared_attention import PromptGroups


@dataclass(slots=True)
class AttentionState:
    """Keys and values of one attention layer.

    Attributes:
        prompt: Keys and values of the prompts, each `[prompts, groups, slots, head_dim]`; a prompt begins at the first slot.
        own: Keys and values of what was decoded, each `[batch, groups, slots, head_dim]`; no slots before decoding begins.
    """

    prompt: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]


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

    Sequences after the same prompt share its keys and values. The tokens of one decoding step all go to the same slot, so writing is one
    copy.

    Attributes:
        max_new_tokens: Tokens that will be decoded at most, over all calls.
        lengths: Tokens of every prompt; empty before the prefill.
        owners: The prompt of every sequence.
        step: Tokens decoded so far.
        prompts: Which sequences share which prompt, as the attention layers read it.
        attention: Per attention layer, by its global number.
        linear: Per DeltaNet layer, by its global number.
        plan: Weights as the decoding loop wants them, set by the prefill.
    """

    max_new_tokens: int
    lengths: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    step: int = 0
    prompts: PromptGroups | None = None
    attention: dict[int, AttentionState] = field(default_factory=dict)
    linear: dict[int, LinearState] = field(default_factory=dict)
    plan: Any = None
    _slots: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.owners)

    def begin(self, cu_seqlens: torch.Tensor, dtype: torch.dtype) -> None:
        """Make room for packed prompts, one sequence after each.

        Args:
            cu_seqlens: `[sequences + 1]`.
            dtype: The network's.
        """
        assert not self.lengths, "a cache is filled by one prefill"
        lengths = cu_seqlens.diff().cpu()
        self.lengths, self.owners = lengths.tolist(), list(range(len(lengths)))
        skipped = torch.arange(len(lengths)) * max(self.lengths) - (lengths.cumsum(0) - lengths)
        self._slots = (torch.arange(int(lengths.sum())) + torch.repeat_interleave(skipped, lengths)).to(cu_seqlens.device)
        self.prompts = PromptGroups.build(self.owners, self.lengths, cu_seqlens.device, dtype)

    def store_attention(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's keys and values of packed prompts, each `[tokens, groups, head_dim]`."""
        nothing = key.new_empty((self.batch_size, key.shape[1], 0, key.shape[2]))
        self.attention[layer] = AttentionState((self._padded(key), self._padded(value)), (nothing, nothing))

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

        Prompts that lose all their sequences are forgotten; the others stay where they are.

        Args:
            index: `[new batch]` int64 on the network's device.
        """
        owners = [self.owners[place] for place in index.tolist()]
        kept = sorted(set(owners))
        if len(kept) < len(self.lengths):
            self._keep_prompts(torch.tensor(kept, device=index.device))
        places = {prompt: place for place, prompt in enumerate(kept)}
        self.owners = [places[owner] for owner in owners]
        for layer in self.attention.values():
            keys, values = layer.own
            layer.own = self._moved(keys, index), self._moved(values, index)
        for state in self.linear.values():
            state.inputs, state.state = state.inputs.index_select(0, index), state.state.index_select(0, index)
        assert self.prompts is not None, "begin comes first"
        self.prompts = PromptGroups.build(self.owners, self.lengths, index.device, self.prompts.dtype)

    def reserve(self) -> None:
        """Make room for the tokens to be decoded, unless an earlier call did."""
        for layer in self.attention.values():
            if layer.own[0].shape[2] < self.max_new_tokens:
                keys = layer.prompt[0]
                shape = (self.batch_size, keys.shape[1], self.max_new_tokens, keys.shape[3])
                layer.own = keys.new_empty(shape), keys.new_empty(shape)

    def _padded(self, packed: torch.Tensor) -> torch.Tensor:
        assert self._slots is not None, "begin comes first"
        prompts, longest = len(self.lengths), max(self.lengths)
        rows = packed.new_zeros((prompts * longest, *packed.shape[1:])).index_copy_(0, self._slots, packed)
        return rows.view(prompts, longest, *packed.shape[1:]).transpose(1, 2).contiguous()

    def _moved(self, own: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        moved = own.new_empty((len(index), *own.shape[1:]))
        moved[:, :, : self.step] = own[:, :, : self.step].index_select(0, index)
        return moved

    def _keep_prompts(self, kept: torch.Tensor) -> None:
        self.lengths = [self.lengths[place] for place in kept.tolist()]
        longest = max(self.lengths, default=0)
        for layer in self.attention.values():
            keys, values = (part[:, :, :longest].index_select(0, kept) for part in layer.prompt)
            layer.prompt = keys, values

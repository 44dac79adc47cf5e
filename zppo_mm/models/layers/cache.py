"""The decoding cache of every sequence: rotated keys, values, and the states of the DeltaNet
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zppo_mm.models.layers.shared_attention import PromptGroups, is_worth_sharing, prompt_mask

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


@dataclass(slots=True)
class AttentionState:
    """Keys and values of one attention layer.

    Attributes:
        prompt: Those of the prompts, each `[prompts, groups, slots, head_dim]`; a prompt ends at
            the last slot. `None` once copied.
        own: Those of each sequence alone, each `[batch, groups, slots, head_dim]`: what was
            decoded, after a copy of the prompt if prompts are copied. `None` before decoding
            begins.
    """

    prompt: Pair | None
    own: Pair | None = None


@dataclass(slots=True)
class LinearState:
    """State of one DeltaNet layer.

    Attributes:
        inputs: `[batch, taps, channels]` last inputs of the convolution, a ring; the next one goes
            to the slot of the cache's step.
        state: `[batch, value_heads, key_dim, value_dim]` float32.
    """

    inputs: torch.Tensor
    state: torch.Tensor


@dataclass(slots=True)
class DecodeCache:
    """State of a batch of sequences on this pipeline stage.

    Sequences after the same prompt share its keys and values as long as that saves time; then each
    gets a copy. Prompts are aligned at their ends: the tokens of one decoding step all go to the
    same slot, so writing is one copy and only the empty slots before short prompts are masked.

    Attributes:
        max_new_tokens: Tokens that will be decoded at most, over all calls.
        lengths: Tokens of every prompt; empty before the prefill.
        owners: The prompt of every sequence.
        step: Tokens decoded so far.
        is_copied: Whether each sequence has a copy of its prompt among its own slots.
        prompts: Which sequences share which prompt, unless prompts are copied.
        mask: `[batch, 1, 1, slots]` if prompts are copied, 0 where a sequence has a token and minus
            infinity before its start; `None` if all are equally long.
        attention: Per attention layer, by its global number.
        linear: Per DeltaNet layer, by its global number.
        plan: Weights in the form of the decoding loop, set by the prefill.
    """

    max_new_tokens: int
    lengths: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    step: int = 0
    prompts: PromptGroups | None = None
    mask: torch.Tensor | None = None
    attention: dict[int, AttentionState] = field(default_factory=dict)
    linear: dict[int, LinearState] = field(default_factory=dict)
    plan: Any = None
    is_copied: bool = False
    _dtype: torch.dtype = torch.float32
    _slots: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        return len(self.owners)

    @property
    def own_slots(self) -> int:
        """Slots that each sequence has for itself and that are used."""
        return self.step + (max(self.lengths) if self.is_copied else 0)

    def begin(self, cu_seqlens: torch.Tensor, dtype: torch.dtype) -> None:
        """Make room for packed prompts, one sequence after each.

        Args:
            cu_seqlens: `[sequences + 1]`.
            dtype: The network's.
        """
        assert not self.lengths, "a cache is filled by one prefill"
        # On the host, once per prefill: which prompt is whose is bookkeeping in Python.
        lengths = cu_seqlens.diff().cpu()
        self.lengths, self.owners, self._dtype = lengths.tolist(), list(range(len(lengths))), dtype
        # Right-aligned: prompt i fills the last slots of row i of `[prompts, longest]`.
        ends = (torch.arange(len(lengths)) + 1) * max(self.lengths)
        self._slots = (
            torch.arange(int(lengths.sum()))
            + torch.repeat_interleave(ends - lengths.cumsum(0), lengths)
        ).to(cu_seqlens.device)

    def store_attention(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's keys and values of packed prompts, each `[tokens, groups, head_dim]`."""
        self.attention[layer] = AttentionState((self._aligned(key), self._aligned(value)))

    def store_linear(
        self, layer: int, sequences: Sequence[int], inputs: torch.Tensor, state: torch.Tensor
    ) -> None:
        """Keep a DeltaNet layer's state after some of the prompts.

        Args:
            layer: Global number.
            sequences: Indices of the prompts in the batch.
            inputs: `[sequences, taps - 1, channels]` last inputs of the convolution.
            state: `[sequences, value_heads, key_dim, value_dim]`.
        """
        if layer not in self.linear:
            # One slot more than the context, so that a step writes its input and then reads all
            # taps from the ring.
            ring = inputs.new_zeros((self.batch_size, inputs.shape[1] + 1, inputs.shape[2]))
            self.linear[layer] = LinearState(
                ring, state.new_zeros((self.batch_size, *state.shape[1:]))
            )
        # `sequences` is one bucket of the packed prefill; others fill the other rows. The last slot
        # of the ring stays free for the first decoded token.
        rows = torch.tensor(sequences, device=inputs.device)
        self.linear[layer].inputs[rows, : inputs.shape[1]] = inputs
        self.linear[layer].state[rows] = state

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences that `index` names, in its order; an index may come several times or
        not at all.

        Prompts that lose all their sequences are forgotten.

        Args:
            index: `[new batch]` int64 on the network's device, at least one.
        """
        slots, owners = max(self.lengths), [self.owners[row] for row in index.tolist()]
        kept = sorted(set(owners))
        new_index = {prompt: row for row, prompt in enumerate(kept)}
        loses_prompts, was_copied = len(kept) < len(self.lengths), self.is_copied
        self.owners = [new_index[owner] for owner in owners]
        self.lengths = [self.lengths[prompt] for prompt in kept]
        # Recurrent states belong to a sequence: they follow `index` even if prompts are shared.
        for state in self.linear.values():
            state.inputs, state.state = (
                state.inputs.index_select(0, index),
                state.state.index_select(0, index),
            )
        if self.step:
            self._arrange(index.device)
        # Prompts end at the last slot: without the longest one the first slots of all are empty.
        unused = slots - max(self.lengths)
        prompts, rows = (torch.tensor(numbers, device=index.device) for numbers in (kept, owners))
        for layer in self.attention.values():
            # `own` is `[batch, groups, slots + max_new_tokens, head_dim]`; cut to what is filled.
            if was_copied:
                layer.own = self._joined(
                    [_picked(layer.own, slice(unused, slots + self.step), index)]
                )
                continue
            decoded = [] if layer.own is None else [_picked(layer.own, slice(self.step), index)]
            if self.is_copied:
                # Sharing saves no time any more: each sequence gets a copy of its prompt.
                decoded.insert(0, _picked(layer.prompt, slice(unused, slots), rows))
                layer.prompt = None
            elif loses_prompts:
                layer.prompt = _picked(layer.prompt, slice(unused, slots), prompts)
            layer.own = self._joined(decoded) if decoded else None

    def reserve(self, device: torch.device) -> None:
        """Make room for the tokens to be decoded, before the first of them.

        Args:
            device: The network's.
        """
        if self.step:
            return
        self._arrange(device)
        rows = torch.tensor(self.owners, device=device)
        for layer in self.attention.values():
            layer.own = self._joined(
                [_picked(layer.prompt, slice(None if self.is_copied else 0), rows)]
            )
            layer.prompt = None if self.is_copied else layer.prompt

    def _arrange(self, device: torch.device) -> None:
        """Set which sequences share which prompt, or that each has a copy because sharing does not
        save time; copies stay copies.
        """
        slots = max(self.lengths)
        self.is_copied = self.is_copied or not is_worth_sharing(self.owners, slots, device)
        if not self.is_copied:
            self.prompts = PromptGroups.build(self.owners, self.lengths, device, self._dtype)
            return
        self.prompts = None
        self.mask = prompt_mask(self.lengths, slots + self.max_new_tokens, device, self._dtype)
        if self.mask is not None:
            # From one row per prompt to one per sequence.
            self.mask = self.mask[torch.tensor(self.owners, device=device)]

    def _joined(self, parts: list[Pair]) -> Pair:
        """Return buffers that begin with the slots of all parts and have room for what is left to
        be decoded.
        """
        capacity = self.max_new_tokens + (max(self.lengths) if self.is_copied else 0)
        # Room for all steps at once: growing by `cat` would copy the cache at every token.
        both = []
        for tensors in zip(*parts, strict=True):
            joined = tensors[0].new_empty((*tensors[0].shape[:2], capacity, tensors[0].shape[3]))
            torch.cat(tensors, 2, out=joined[:, :, : sum(tensor.shape[2] for tensor in tensors)])
            both.append(joined)
        return both[0], both[1]

    def _aligned(self, packed: torch.Tensor) -> torch.Tensor:
        assert self._slots is not None, "begin comes first"
        prompts, longest = len(self.lengths), max(self.lengths)
        rows = packed.new_zeros((prompts * longest, *packed.shape[1:])).index_copy_(
            0, self._slots, packed
        )
        # To `[prompts, groups, longest, head_dim]`, as the attention of the decoding loop reads it.
        return rows.view(prompts, longest, *packed.shape[1:]).transpose(1, 2).contiguous()


def _picked(pair: Pair | None, slots: slice, rows: torch.Tensor) -> Pair:
    assert pair is not None
    return pair[0][:, :, slots].index_select(0, rows), pair[1][:, :, slots].index_select(0, rows)

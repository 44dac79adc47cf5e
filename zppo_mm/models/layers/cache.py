"""The decoding cache of a batch: rotated keys and values in blocks, and the states of the DeltaNet
layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zppo_mm.experience import IntArray
from zppo_mm.models.layers.blocks import BlockTable, Moves
from zppo_mm.models.layers.paged_attention import BlockReads, PromptReads

SLOTS_PER_BLOCK = 128
"""Tokens of a block. Half a block is wasted per sequence, against what a read of many small ones
costs (benchmarks/decode_attention.py).
"""


@dataclass(frozen=True, slots=True)
class Admission:
    """One sequence of a prefill, and the rows of the batch that go on from it.

    Attributes:
        prompt: Names the prompt: rows of the same one share its blocks.
        num_prompt_tokens: Tokens of it at the start of the sequence; the tokens after them belong
            to the row alone.
        num_rows: 1 if there are such tokens.
    """

    prompt: Hashable
    num_prompt_tokens: int
    num_rows: int = 1


@dataclass(slots=True)
class LinearState:
    """State of one DeltaNet layer.

    Attributes:
        inputs: `[rows, taps, channels]` last inputs of the convolution, a ring; the next one goes
            to the slot of the cache's step.
        state: `[rows, value_heads, key_dim, value_dim]` float32.
    """

    inputs: torch.Tensor
    state: torch.Tensor


_Piece = tuple[int, int, IntArray]
"""First token in the pack, number of tokens, and their blocks."""


@dataclass(frozen=True, slots=True)
class _Filling:
    """Where a prefill puts its tokens.

    Attributes:
        tokens: `[kept]` tokens of the pack that are kept.
        blocks: `[kept]` the block of each.
        slots: `[kept]` the slot of each in its block.
        new_blocks: Blocks that hold nothing else.
        rows: Of every sequence the rows that go on from it.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    new_blocks: torch.Tensor
    rows: list[range]


@dataclass(slots=True)
class DecodeCache:
    """State of a batch of sequences on this pipeline stage.

    Sequences are rows. They come by a prefill, take blocks as they grow, and leave at any time,
    the last rows then take their numbers. Blocks of prompts are shared by their rows. Blocks of the
    rows fill the cache from its first block on, those of prompts from its last one.

    Attributes:
        num_blocks: Most blocks in use at once.
        max_rows: Most rows at once.
        slots_per_block: Tokens of a block.
        step: Tokens decoded so far.
        attention: Per attention layer, by its global number, keys and values `[2, blocks, groups,
            slots, head_dim]`.
        linear: Per DeltaNet layer, by its global number.
        plan: Weights in the form of the decoding loop, set by the first prefill.
        empty: `[blocks, slots]` minus infinity at slots without a token, else 0.
        reads: Which rows read which blocks in this step.
        tail: `[rows]` blocks and `[rows]` slots of the token that this step decodes.
    """

    num_blocks: int
    max_rows: int
    slots_per_block: int = SLOTS_PER_BLOCK
    step: int = 0
    attention: dict[int, torch.Tensor] = field(default_factory=dict)
    linear: dict[int, LinearState] = field(default_factory=dict)
    plan: Any = None
    empty: torch.Tensor | None = None
    reads: BlockReads | None = None
    tail: tuple[torch.Tensor, torch.Tensor] | None = None
    _own: BlockTable = field(default_factory=BlockTable)
    _prompts: BlockTable = field(default_factory=BlockTable)
    _names: list[Hashable] = field(default_factory=list)
    _prompt_lengths: list[int] = field(default_factory=list)
    _prompt_of: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    _lengths: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    _filling: _Filling | None = None
    _prompt_reads: PromptReads | None = None

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - self._own.num_blocks - self._prompts.num_blocks

    @property
    def num_missing_blocks(self) -> int:
        """Blocks that the next token of every row needs beyond those that are free; 0 or less if
        it can be decoded.
        """
        full = self._own.counts * self.slots_per_block == self._lengths
        return int(full.sum()) - self.num_free_blocks

    def blocks_of(self, num_tokens: int) -> int:
        """Return the blocks that hold so many tokens."""
        return -(-num_tokens // self.slots_per_block)

    def holds(self, prompt: Hashable) -> bool:
        """Return whether rows of this prompt are in the batch."""
        return prompt in self._names

    def begin(
        self, cu_seqlens: torch.Tensor, admissions: Sequence[Admission], dtype: torch.dtype
    ) -> None:
        """Make room for the sequences of a prefill; their rows follow those that are there, in
        order.

        Args:
            cu_seqlens: `[sequences + 1]`; sequences beyond the admissions are not kept.
            admissions: One per sequence.
            dtype: The network's.
        """
        # On the host, once per prefill: where each token goes is bookkeeping in Python.
        bounds, device = cu_seqlens.tolist(), cu_seqlens.device
        first_row, pieces, rows = self.batch_size, [], []
        for start, end, admission in zip(bounds, bounds[1:], admissions, strict=False):
            pieces += self._add_rows(admission, start, end)
            rows.append(range(first_row, first_row + admission.num_rows))
            first_row += admission.num_rows
        assert self.num_free_blocks >= 0, "the blocks of a cache are counted before a prefill"
        assert self.batch_size <= self.max_rows, "the rows of a cache are counted before a prefill"
        self._reads_changed(of_prompts=True)
        counts = [np.arange(num_tokens) for _, num_tokens, _ in pieces]
        tokens, blocks, slots, new_blocks = (
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts])).to(device)
            for parts in (
                [first + count for (first, _, _), count in zip(pieces, counts, strict=True)],
                [
                    held[count // self.slots_per_block]
                    for (_, _, held), count in zip(pieces, counts, strict=True)
                ],
                [count % self.slots_per_block for count in counts],
                [held for _, _, held in pieces],
            )
        )
        self._filling = _Filling(tokens, blocks, slots, new_blocks, rows)
        if self.empty is None:
            self.empty = torch.empty(
                (self.num_blocks, self.slots_per_block), dtype=dtype, device=device
            )
        self.empty[new_blocks] = float("-inf")
        self.empty[blocks, slots] = 0

    def _add_rows(self, admission: Admission, start: int, end: int) -> list[_Piece]:
        """Add the rows of one sequence, tokens `start` to `end` of the pack; returns which of its
        tokens go to which blocks.
        """
        num_prompt = admission.num_prompt_tokens
        num_own, pieces = end - start - num_prompt, []
        assert num_own >= 0, "a sequence begins with its prompt"
        assert num_own == 0 or admission.num_rows == 1, "only one row has tokens of its own"
        if not self.holds(admission.prompt):
            blocks = self._prompts.add(self.blocks_of(num_prompt))
            self._names.append(admission.prompt)
            self._prompt_lengths.append(num_prompt)
            pieces.append((start, num_prompt, self.num_blocks - 1 - blocks))
        for _ in range(admission.num_rows):
            pieces.append((end - num_own, num_own, self._own.add(self.blocks_of(num_own))))
        prompt = self._names.index(admission.prompt)
        self._prompt_of = np.append(self._prompt_of, [prompt] * admission.num_rows)
        self._lengths = np.append(self._lengths, [num_own] * admission.num_rows)
        return pieces

    def store_attention(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's keys and values of packed sequences, each `[tokens, groups, head_dim]`."""
        to = self._filling
        assert to is not None, "begin comes first"
        if layer not in self.attention:
            # Not filled: the system gives memory to what is written only.
            self.attention[layer] = key.new_empty(
                (2, self.num_blocks, key.shape[1], self.slots_per_block, key.shape[2])
            )
        # As in `_clear`.
        self.attention[layer][:, to.new_blocks] = 0
        for held, new in zip(self.attention[layer], (key, value), strict=True):
            held[to.blocks, :, to.slots] = new[to.tokens]

    def store_linear(
        self, layer: int, sequences: Sequence[int], inputs: torch.Tensor, state: torch.Tensor
    ) -> None:
        """Keep a DeltaNet layer's state after some of the sequences.

        Args:
            layer: Global number.
            sequences: Indices of them in the pack.
            inputs: `[sequences, taps - 1, channels]` last inputs of the convolution.
            state: `[sequences, value_heads, key_dim, value_dim]`.
        """
        assert self._filling is not None, "begin comes first"
        taps = inputs.shape[1] + 1
        if layer not in self.linear:
            # One slot more than the context, so that a step writes its input and then reads all
            # taps from the ring.
            self.linear[layer] = LinearState(
                inputs.new_zeros((self.max_rows, taps, inputs.shape[2])),
                state.new_zeros((self.max_rows, *state.shape[1:])),
            )
        pairs = [
            (row, source)
            for source, sequence in enumerate(sequences)
            if sequence < len(self._filling.rows)
            for row in self._filling.rows[sequence]
        ]
        if not pairs:
            return
        rows, sources = torch.tensor(pairs, device=inputs.device).unbind(1)
        # The newest input stands before the slot of the next one, which is the step's.
        ring = torch.nn.functional.pad(inputs, (0, 0, 0, 1)).roll(self.step, 1)
        self.linear[layer].inputs[rows] = ring[sources]
        self.linear[layer].state[rows] = state[sources]

    def release(self, rows: IntArray) -> Moves:
        """Drop these rows, all different, and prompts that are left without any; returns how the
        rows that stay are numbered then.
        """
        of_rows, own = self._own.remove(rows)
        for held in (self._prompt_of, self._lengths):
            held[of_rows.targets] = held[of_rows.sources]
        self._prompt_of, self._lengths = (
            held[: self._own.num_owners] for held in (self._prompt_of, self._lengths)
        )
        unused = np.setdiff1d(np.arange(len(self._names)), self._prompt_of)
        of_prompts, shared = self._prompts.remove(unused)
        for target, source in zip(of_prompts.targets, of_prompts.sources, strict=True):
            self._names[target] = self._names[source]
            self._prompt_lengths[target] = self._prompt_lengths[source]
            self._prompt_of[self._prompt_of == source] = target
        del self._names[self._prompts.num_owners :]
        del self._prompt_lengths[self._prompts.num_owners :]
        self._reads_changed(of_prompts=True)
        last = self.num_blocks - 1
        self._move_blocks(
            np.concatenate([own.targets, last - shared.targets]),
            np.concatenate([own.sources, last - shared.sources]),
        )
        for state in self.linear.values():
            if of_rows:
                targets, sources = (
                    torch.from_numpy(index).to(state.state.device)
                    for index in (of_rows.targets, of_rows.sources)
                )
                state.inputs[targets] = state.inputs[sources]
                state.state[targets] = state.state[sources]
        return of_rows

    def _move_blocks(self, targets: IntArray, sources: IntArray) -> None:
        if not len(targets) or self.empty is None:
            return
        to, of = (torch.from_numpy(index).to(self.empty.device) for index in (targets, sources))
        self.empty[to] = self.empty[of]
        for blocks in self.attention.values():
            blocks[:, to] = blocks[:, of]

    def extend(self, device: torch.device) -> None:
        """Make room for the next token of every row, which every layer then writes at `tail`.

        Args:
            device: The network's.
        """
        assert self.num_missing_blocks <= 0, "the blocks of a cache are counted before a step"
        full = np.flatnonzero(self._own.counts * self.slots_per_block == self._lengths)
        if len(full):
            self._reads_changed(of_prompts=False)
            self._clear(torch.from_numpy(self._own.extend(full)).to(device))
        self._lengths += 1
        if self.reads is None or self.tail is None:
            self.reads = self._arrange(device)
            last = self._own.table[np.arange(self.batch_size), self._own.counts - 1]
            self.tail = (
                torch.from_numpy(last).to(device),
                torch.from_numpy((self._lengths - 1) % self.slots_per_block).to(device),
            )
        else:
            self.tail[1].add_(1)
        self.reads.slots = min(self.slots_per_block, int(self._lengths.max()))
        if self.empty is not None:
            self.empty[self.tail] = 0

    def _arrange(self, device: torch.device) -> BlockReads:
        if self._prompt_reads is None:
            self._prompt_reads = PromptReads.build(
                self._prompts,
                self._prompt_of,
                next((held.shape[2] for held in self.attention.values()), 1),
                min(self.slots_per_block, max(self._prompt_lengths)),
                device,
            )
        first = self.num_blocks - self._prompts.num_blocks
        return BlockReads.build(self._own, self._prompt_reads, first)

    def _reads_changed(self, of_prompts: bool) -> None:
        self.reads = self.tail = None
        if of_prompts:
            self._prompt_reads = None

    def _clear(self, blocks: torch.Tensor) -> None:
        """Empty new blocks: slots without a token count for nothing, but what is in them has to be
        finite.
        """
        for held in self.attention.values():
            held[:, blocks] = 0
        if self.empty is not None:
            self.empty[blocks] = float("-inf")

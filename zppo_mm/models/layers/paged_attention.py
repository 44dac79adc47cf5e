"""Attention of one token per sequence to keys and values in blocks.

Every block in use is read once, as one entry of a batch: its queries are those of the sequence
that it belongs to, or of all sequences that share the prompt it is part of. Keys are neither
gathered nor copied. A softmax over all blocks of a sequence is the mean of the softmaxes of the
blocks, weighted by their sums of exponentials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zppo_mm.experience import IntArray
from zppo_mm.models.layers.blocks import BlockTable

MAX_READ_ELEMENTS = 1 << 26
"""Most elements of the float32 copies of keys and values that `read_plainly` makes at once."""


@dataclass(frozen=True, slots=True)
class PromptReads:
    """Which sequences read which block of the prompts; blocks in the order of their addresses.

    Attributes:
        queries: `[prompt blocks * groups * width]` the sequences that read each block, as an
            index in `[batch * groups]`; filled up with any sequence.
        width: Sequences of the prompt that most share.
        results: `[batch, most blocks of a prompt]` what each sequence reads, as an index in
            `[prompt blocks * width]`.
        is_read: Like `results`, whether there is such a block.
        slots: Slots of a block that are read: all, or the tokens of the longest prompt.
    """

    queries: torch.Tensor
    width: int
    results: IntArray
    is_read: npt.NDArray[np.bool_]
    slots: int

    @staticmethod
    def build(
        table: BlockTable, prompt_of: IntArray, groups: int, slots: int, device: torch.device
    ) -> PromptReads:
        """Arrange the prompts of a batch.

        Args:
            table: Blocks of the prompts, numbered against the order of their addresses.
            prompt_of: `[batch]` the prompt of each sequence; every prompt has one at least.
            groups: KV heads.
            slots: Slots of a block to be read.
            device: The network's.
        """
        order = np.argsort(prompt_of, kind="stable")
        sizes = np.bincount(prompt_of, minlength=table.num_owners)
        starts = np.cumsum(sizes) - sizes
        width = int(sizes.max())
        member = np.empty_like(prompt_of)
        member[order] = np.arange(len(order)) - starts[prompt_of[order]]
        members = np.zeros((table.num_owners, width), np.int64)
        members[prompt_of, member] = np.arange(len(prompt_of))
        of_blocks = members[table.owners[::-1]][:, None]
        queries = of_blocks * groups + np.arange(groups)[:, None]
        blocks = table.table[prompt_of]
        return PromptReads(
            torch.from_numpy(queries.reshape(-1)).to(device),
            width,
            (table.num_blocks - 1 - blocks) * width + member[:, None],
            np.arange(blocks.shape[1]) < table.counts[prompt_of][:, None],
            slots,
        )


@dataclass(slots=True)
class BlockReads:
    """Which sequences of a batch read which blocks.

    Attributes:
        prompts: Those of the prompts, which begin at `first_prompt_block`.
        queries: `[own blocks]` the sequence of each block that belongs to one alone; these come
            first in the cache.
        results: `[batch * parts]` for each sequence the results of its blocks, as an index in
            `[own blocks + prompt blocks * width]`; filled up with results of its own.
        no_part: `[batch, parts, 1, 1, 1]` float32, minus infinity at what fills up, else 0;
            `None` if nothing does.
        first_prompt_block: Address of the first block of the prompts; they end with the cache.
        slots: Slots of a block of its own that a sequence reads: all, or the tokens of the longest;
            set at every step.
    """

    prompts: PromptReads
    queries: torch.Tensor
    results: torch.Tensor
    no_part: torch.Tensor | None
    first_prompt_block: int
    slots: int = 0

    @staticmethod
    def build(own: BlockTable, prompts: PromptReads, first_prompt_block: int) -> BlockReads:
        """Arrange a batch.

        Args:
            own: Blocks of each sequence alone, one at least.
            prompts: What is read of the prompts.
            first_prompt_block: Address of the first.
        """
        device = prompts.queries.device
        results = np.concatenate([own.table, prompts.results + own.num_blocks], 1)
        is_read = np.concatenate(
            [np.arange(own.table.shape[1]) < own.counts[:, None], prompts.is_read], 1
        )
        # Filled up with what is the sequence's own: another one's could be NaN, even at weight 0.
        results = np.where(is_read, results, results[:, :1])
        no_part = None
        if not is_read.all():
            fill = torch.from_numpy(np.where(is_read, 0.0, -np.inf).astype(np.float32))
            no_part = fill.to(device)[..., None, None, None]
        return BlockReads(
            prompts,
            torch.from_numpy(own.owners.copy()).to(device),
            torch.from_numpy(results.reshape(-1)).to(device),
            no_part,
            first_prompt_block,
        )


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    empty: torch.Tensor,
    reads: BlockReads,
) -> torch.Tensor:
    """Attend to the prompts and to the sequences' own tokens.

    Args:
        queries: `[batch, groups, heads, head_dim]`, the query heads of one KV head.
        keys: `[blocks, groups, slots, head_dim]`, all of the cache.
        values: Like `keys`.
        empty: `[blocks, slots]` in the type of the keys, minus infinity at slots without a token,
            else 0.
        reads: Who reads what.

    Returns:
        `[batch, groups, heads, head_dim]`.
    """
    batch, groups, heads, dim = queries.shape
    shared, first = reads.prompts, reads.first_prompt_block
    own, own_slots = slice(len(reads.queries)), slice(reads.slots)
    of_own = read(
        queries.index_select(0, reads.queries),
        keys[own, :, own_slots],
        values[own, :, own_slots],
        empty[own, own_slots],
    )
    # The sequences of a prompt become the tokens of one: `[blocks, groups, width * heads, dim]`.
    together = queries.reshape(-1, heads * dim).index_select(0, shared.queries)
    of_prompts = read(
        together.view(-1, groups, shared.width * heads, dim),
        keys[first:, :, : shared.slots],
        values[first:, :, : shared.slots],
        empty[first:, : shared.slots],
    )

    def results(index: int, channels: int) -> torch.Tensor:
        """Return `[batch, parts, heads, groups, channels]` of both."""
        # The kernel writes tokens before groups, so that this copies nothing yet.
        both = [
            part[index].transpose(1, 2).reshape(-1, heads * groups * channels)
            for part in (of_own, of_prompts)
        ]
        return (
            torch.cat(both).index_select(0, reads.results).view(batch, -1, heads, groups, channels)
        )

    sums = results(1, 1)
    if reads.no_part is not None:
        sums = sums + reads.no_part
    mixed = (results(0, dim) * sums.softmax(1)).sum(1)
    return mixed.transpose(1, 2).to(queries.dtype)


def read(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, empty: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend inside each block, and return the log-sum-exp of the scores too.

    Args:
        queries: `[blocks, groups, tokens, head_dim]`.
        keys: `[blocks, groups, slots, head_dim]`.
        values: Like `keys`.
        empty: `[blocks, slots]`, added to the scores.

    Returns:
        What was read, like `queries`, and the logarithm of each softmax's sum of exponentials,
        float32 `[blocks, groups, tokens]`.
    """
    if queries.device.type != "cpu":
        return read_plainly(queries, keys, values, empty)
    mask = empty[:, None, None].expand(-1, *queries.shape[1:3], -1)
    # The kernel behind scaled_dot_product_attention; the public function does not return the sums.
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, attn_mask=mask
    )
    return output, sums


def read_plainly(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, empty: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `read` does by matrix products, on any device."""
    blocks = max(1, MAX_READ_ELEMENTS // max(1, 2 * keys[0].numel()))
    outputs, sums = [], []
    for part in zip(
        *(torch.split(each, blocks) for each in (queries, keys, values, empty)), strict=True
    ):
        # In bfloat16 the scores themselves would be rounded.
        query, key, value, mask = (each.float() for each in part)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask[:, None, None]
        sums.append(scores.logsumexp(-1))
        weights = (scores - sums[-1][..., None]).exp_()
        outputs.append((weights @ value).to(queries.dtype))
    return torch.cat(outputs), torch.cat(sums)

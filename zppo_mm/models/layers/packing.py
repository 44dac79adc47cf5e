"""Packed sequences `[tokens]` to padded batches `[sequences, longest]` and back, for kernels
without support for packing.

A sequence of a pack may continue another one, its parent, as every response of a group continues
the prompt (shared-prefix training). The parent is computed once, and its children start from its
state: keys and values, DeltaNet state, last inputs of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.nn.attention.bias import causal_lower_right

from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.models.layers.ulysses import UlyssesExchange

MAX_PADDING_RATIO = 2
"""A sequence shares a padded batch with one at most this many times as long."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, padded on the right to the longest.

    Attributes:
        sequences: Their indices in the pack.
        lengths: Their tokens.
        tokens: `[tokens of the bucket]` indices in the pack, `None` when the bucket is the whole
            pack.
        slots: `[tokens of the bucket]` indices in the flattened batch, `None` when nothing is
            padded.
        has_children: Whether a sequence of another bucket continues one of these.
    """

    sequences: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: torch.Tensor | None
    slots: torch.Tensor | None
    has_children: bool = False

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn `[tokens of the pack, ...]` into `[sequences, longest, ...]`, zero where padded."""
        # Where every sequence is as long as the longest, padding is a view.
        mine = packed if self.tokens is None else packed.index_select(0, self.tokens)
        rest = packed.shape[1:]
        if self.slots is not None:
            # Flat `[sequences * longest, ...]`: one index_copy for all rows; its gradient gathers.
            empty = packed.new_zeros((len(self.lengths) * self.longest, *rest))
            mine = empty.index_copy(0, self.slots, mine)
        return mine.reshape(len(self.lengths), self.longest, *rest)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Turn `[sequences, longest, ...]` into `[tokens of the bucket, ...]`."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass(frozen=True, slots=True)
class ChildGroup:
    """The children of one parent in a bucket, which are next to each other there.

    Attributes:
        parent: Its index in the pack.
        num_children: Rows of the bucket.
        mask: `[longest child, parent's tokens + longest child]` whether a child's token attends
            to a token: the whole parent, and its own past. On a GPU without elements: given any,
            torch would compute grouped heads there without a fused kernel.
    """

    parent: int
    num_children: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """Children of similar length, of any parents.

    Attributes:
        bucket: The children.
        child_groups: Together every child of the bucket once, in its order.
        parent_rows: `[children]` int64, the parent of each among the sequences of all buckets that
            have children, concatenated.
    """

    bucket: Bucket
    child_groups: tuple[ChildGroup, ...]
    parent_rows: torch.Tensor


@dataclass
class PackedLayout(PackedSeqParams):  # type: ignore[misc]
    """Megatron's packed-sequence parameters, and the padded batches for kernels that need them.

    Attributes:
        buckets: Together every sequence without a parent once.
        branches: Together every sequence with a parent once.
        lengths: Tokens of every sequence.
        order: `[tokens]` index of every token in the concatenated tokens of buckets and branches;
            `None` when that is the pack itself.
        cache: Where a prefill keeps keys, values and DeltaNet states; `None` in training.
        exchange: Ulysses all-to-alls of the ranks that share this pack; `None` where each rank has
            the whole pack.
    """

    buckets: tuple[Bucket, ...] = ()
    branches: tuple[Branch, ...] = ()
    lengths: tuple[int, ...] = ()
    order: torch.Tensor | None = None
    cache: DecodeCache | None = field(default=None)
    exchange: UlyssesExchange | None = field(default=None)

    @cached_property
    def long_bounds(self) -> torch.Tensor:
        """The bounds of the sequences as int64, one tensor for all layers: flash-linear-attention
        keeps what it derives from them for as long as it is given the same object.
        """
        bounds: torch.Tensor = self.cu_seqlens_q.long()
        return bounds

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Turn one `[tokens of the bucket, ...]` per bucket, then per branch, into `[tokens of the
        pack, ...]`.
        """
        if self.order is None:
            return parts[0]
        return torch.cat(parts).index_select(0, self.order)


def build_layout(
    cu_seqlens: torch.Tensor,
    cache: DecodeCache | None = None,
    parents: Sequence[int] | None = None,
    exchange: UlyssesExchange | None = None,
) -> PackedLayout:
    """Sort the sequences of a pack into buckets of similar length.

    Args:
        cu_seqlens: `[sequences + 1]` int32, start of every sequence and the end of the last.
        cache: Filled by the forward pass if given.
        parents: Per sequence the one that it continues, -1 for none; sequences beyond the last
            entry have none. A parent has no parent itself.
        exchange: Ulysses all-to-alls of the ranks that share the pack, if any do.
    """
    # One copy to the host per pack: the layout is Python, and is built once for all layers.
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    roots, children = _sort_out(lengths, parents or ())
    # Siblings next to each other, so that one masked attention serves all children of a parent.
    groups = _alike(roots, lengths)
    sibling_groups = [
        sorted(siblings, key=lambda child: (children[child], child))
        for siblings in _alike(list(children), lengths)
    ]
    device = cu_seqlens.device
    starts = torch.tensor(bounds[:-1])
    # With a single part the pack itself is the batch, and nothing is gathered or put back.
    whole = len(groups) + len(sibling_groups) == 1
    with_children = set(children.values())
    buckets = tuple(
        _bucket(sorted(group), starts, lengths, whole, device, not with_children.isdisjoint(group))
        for group in groups
    )
    # A branch takes its initial states from the concatenated states of these buckets' rows.
    parent_rows = {
        parent: row
        for row, parent in enumerate(
            sequence for b in buckets if b.has_children for sequence in b.sequences
        )
    }
    branches = []
    for siblings in sibling_groups:
        bucket = _bucket(siblings, starts, lengths, whole, device)
        rows = torch.tensor([parent_rows[children[child]] for child in siblings], device=device)
        branches.append(Branch(bucket, _child_groups(bucket, children, lengths, device), rows))
    order = None
    if not whole:
        # Inverse permutation: from the concatenated parts back to the order of the pack.
        tokens = [bucket.tokens for bucket in (*buckets, *(branch.bucket for branch in branches))]
        order = torch.argsort(torch.cat([indices for indices in tokens if indices is not None]))
    return PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        buckets=buckets,
        branches=tuple(branches),
        lengths=tuple(lengths),
        order=order,
        cache=cache,
        exchange=exchange,
    )


def _sort_out(lengths: list[int], parents: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """Return the sequences without a parent, and the parent of each of the others; empty sequences
    are left out.
    """
    # One level only: a child starts from its parent's final state, which a bucket computes, and
    # branches run after all buckets.
    children = {
        child: parent for child, parent in enumerate(parents) if parent >= 0 and lengths[child]
    }
    for child, parent in children.items():
        assert parent not in children, (
            f"sequence {child} continues {parent}, which continues another one"
        )
        assert lengths[parent], f"sequence {child} continues {parent}, which is empty"
    return [
        sequence for sequence, length in enumerate(lengths) if length and sequence not in children
    ], children


def _alike(sequences: list[int], lengths: list[int]) -> list[list[int]]:
    """Divide sequences into groups of similar length, the longest first."""
    groups: list[list[int]] = []
    for sequence in sorted(sequences, key=lambda index: -lengths[index]):
        # In descending order the first of a group is its longest, so it bounds the padding of all.
        if groups and lengths[groups[-1][0]] <= MAX_PADDING_RATIO * lengths[sequence]:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _child_groups(
    bucket: Bucket, children: dict[int, int], lengths: list[int], device: torch.device
) -> tuple[ChildGroup, ...]:
    """Divide a bucket's children by parent."""
    child_groups = []
    # `groupby` needs siblings next to each other, as `build_layout` sorts them.
    for parent, members in groupby(bucket.sequences, key=children.__getitem__):
        shape = (bucket.longest, lengths[parent] + bucket.longest)
        mask: torch.Tensor = (
            torch.ones(shape, dtype=torch.bool).tril(lengths[parent])
            if device.type == "cpu"
            else causal_lower_right(*shape)
        )
        child_groups.append(ChildGroup(parent, len(list(members)), mask))
    return tuple(child_groups)


def _bucket(
    sequences: list[int],
    starts: torch.Tensor,
    all_lengths: list[int],
    whole: bool,
    device: torch.device,
    has_children: bool = False,
) -> Bucket:
    lengths = [all_lengths[sequence] for sequence in sequences]
    longest = max(lengths)
    counts = torch.tensor(lengths)
    # Position of every token in its sequence: 0, 1, … per sequence, `[tokens of the bucket]`.
    offsets = torch.arange(int(counts.sum())) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts
    )
    # Both `[tokens of the bucket]`: where a token is in the padded batch, and where in the pack.
    slots = torch.repeat_interleave(torch.arange(len(lengths)) * longest, counts) + offsets
    tokens = torch.repeat_interleave(starts[sequences], counts) + offsets
    return Bucket(
        sequences=tuple(sequences),
        lengths=tuple(lengths),
        tokens=None if whole else tokens.to(device),
        slots=None if min(lengths) == longest else slots.to(device),
        has_children=has_children,
    )

"""Packed sequences `[tokens]` to padded batches `[sequences, longest]` and back, for kernels that know no packing."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from zppo_mm.models.cache import DecodeCache

MAX_PADDING_RATIO = 2
"""A sequence shares a padded batch with one at most this many times as long."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, padded on the right to the longest.

    Attributes:
        sequences: Their places in the pack.
        lengths: Their tokens.
        tokens: `[tokens of the bucket]` places in the pack, `None` when the bucket is the whole pack.
        slots: `[tokens of the bucket]` places in the flattened batch, `None` when nothing is padded.
    """

    sequences: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: torch.Tensor | None
    slots: torch.Tensor | None

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn `[tokens of the pack, ...]` into `[sequences, longest, ...]`, zero where padded."""
        mine = packed if self.tokens is None else packed.index_select(0, self.tokens)
        rest = packed.shape[1:]
        if self.slots is not None:
            empty = packed.new_zeros((len(self.lengths) * self.longest, *rest))
            mine = empty.index_copy(0, self.slots, mine)
        return mine.reshape(len(self.lengths), self.longest, *rest)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Turn `[sequences, longest, ...]` into `[tokens of the bucket, ...]`."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self.slots is None else flat.index_select(0, self.slots)


@dataclass
class PackedLayout(PackedSeqParams):  # type: ignore[misc]
    """Megatron's packed-sequence parameters, and the padded batches for kernels that need them.

    Attributes:
        buckets: Together every sequence of the pack once.
        order: `[tokens]` place of every token in the buckets' tokens laid end to end; `None` when that is the pack itself.
        cache: Where a prefill keeps keys, values and DeltaNet states; `None` in training.
    """

    buckets: tuple[Bucket, ...] = ()
    order: torch.Tensor | None = None
    cache: DecodeCache | None = field(default=None)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Turn one `[tokens of the bucket, ...]` per bucket into `[tokens of the pack, ...]`."""
        if self.order is None:
            return parts[0]
        return torch.cat(parts).index_select(0, self.order)

    def without_buckets(self) -> PackedSeqParams:
        """Return the plain parameters, as Transformer Engine wants them."""
        return PackedSeqParams(
            qkv_format=self.qkv_format,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_kv=self.cu_seqlens_kv,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_kv=self.max_seqlen_kv,
        )


def build_layout(cu_seqlens: torch.Tensor, cache: DecodeCache | None = None) -> PackedLayout:
    """Sort the sequences of a pack into buckets of similar length.

    Args:
        cu_seqlens: `[sequences + 1]` int32, start of every sequence and the end of the last.
        cache: Filled by the forward pass if given.
    """
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    groups: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if lengths[sequence] == 0:
            continue
        if groups and lengths[groups[-1][0]] <= MAX_PADDING_RATIO * lengths[sequence]:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    device = cu_seqlens.device
    starts = torch.tensor(bounds[:-1])
    buckets = tuple(_bucket(sorted(group), starts, lengths, len(groups) == 1, device) for group in groups)
    order = None
    if len(buckets) > 1:
        order = torch.argsort(torch.cat([bucket.tokens for bucket in buckets if bucket.tokens is not None]))
    longest = max(lengths)
    return PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=buckets,
        order=order,
        cache=cache,
    )


def _bucket(sequences: list[int], starts: torch.Tensor, all_lengths: list[int], whole: bool, device: torch.device) -> Bucket:
    lengths = [all_lengths[sequence] for sequence in sequences]
    longest = max(lengths)
    counts = torch.tensor(lengths)
    offsets = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    slots = torch.repeat_interleave(torch.arange(len(lengths)) * longest, counts) + offsets
    tokens = torch.repeat_interleave(starts[sequences], counts) + offsets
    return Bucket(
        sequences=tuple(sequences),
        lengths=tuple(lengths),
        tokens=None if whole else tokens.to(device),
        slots=None if min(lengths) == longest else slots.to(device),
    )

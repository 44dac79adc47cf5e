"""The shards of a distributed checkpoint: slices of whole tensors, with the memory that holds them
on this rank.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

CHUNK_BYTES = 1 << 26
"""What is written and read at once: a rank reads the chunks that overlap its shards, each of them
whole.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorShard:
    """A slice of a whole tensor, with Megatron's names for its global position.

    Attributes:
        key: The whole tensor's name in the checkpoint.
        global_shape: Of the whole tensor.
        global_offset: First element of the shard along every axis of the whole.
        tensor: The shard, with as many axes as the whole.
    """

    key: str
    global_shape: torch.Size
    global_offset: torch.Size
    tensor: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class WriteChunk:
    """What is written at once: a shard of at most about `CHUNK_BYTES`, or a small object.

    Attributes:
        item: Its entry in the checkpoint's plan.
        content: Makes the tensor, or the object as bytes, when its turn has come.
    """

    item: WriteItem
    content: Callable[[], torch.Tensor | bytes]


def parts_of(entry: Any) -> list[ShardedTensor]:
    """Return the tensors that one of Megatron's entries is saved as; a fused parameter is saved as
    its sections.
    """
    return (
        list(nested_values([entry.build()])) if isinstance(entry, ShardedTensorFactory) else [entry]
    )


def shards_of(entry: Any) -> list[TensorShard]:
    """Return an entry's tensors as shards that share its memory; a small object has none."""
    if isinstance(entry, ShardedObject):
        return []
    return [_shard(part, part.data.detach(), [0] * part.data.ndim) for part in parts_of(entry)]


def flat_shards_of(entry: Any, data: torch.Tensor, start: int, prefix: str) -> list[TensorShard]:
    """Return shards of other contents for a stretch of an entry's elements.

    Args:
        entry: Megatron's, of a parameter.
        data: `[elements]`, contiguous: a stretch of something with the parameter's shape, in memory
            order.
        start: Where the stretch begins in the parameter.
        prefix: Put before the entry's keys.
    """
    # Gives the offsets of a fused parameter's sections, without memory.
    whole = dataclasses.replace(
        entry, data=torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    )
    shards = []
    for part in parts_of(whole):
        assert part.data.is_contiguous(), f"{part.key}: sections are cut along the first axis"
        begin = part.data.storage_offset()
        first, last = max(start, begin), min(start + data.numel(), begin + part.data.numel())
        for offsets, sizes, element in _cut(tuple(part.data.shape), first - begin, last - begin):
            here = begin + element - start
            shard = _shard(part, data[here : here + math.prod(sizes)].view(sizes), offsets)
            shards.append(dataclasses.replace(shard, key=f"{prefix}{part.key}"))
    return shards


def _shard(part: ShardedTensor, data: torch.Tensor, offsets: Sequence[int]) -> TensorShard:
    prepended = part.prepend_axis_num
    # Megatron prepends an axis per stack of layers, along which the shard is one element.
    global_offset = [
        origin + step
        for origin, step in zip(part.global_offset, [0] * prepended + list(offsets), strict=True)
    ]
    shape = torch.Size([1] * prepended + list(data.shape))
    return TensorShard(
        part.key, torch.Size(part.global_shape), torch.Size(global_offset), data.view(shape)
    )


def _cut(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[list[int], list[int], int]]:
    """Cut a stretch of a tensor's elements, in memory order, into shards: offsets, sizes and first
    element of each.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield [start], [stop - start], start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _cut_row(shape, last, start, stop)
        return
    if start < first * row:
        yield from _cut_row(shape, first - 1, start, first * row)
    if first < last:
        yield [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]], first * row
    if last * row < stop:
        yield from _cut_row(shape, last, last * row, stop)


def _cut_row(
    shape: tuple[int, ...], number: int, start: int, stop: int
) -> Iterator[tuple[list[int], list[int], int]]:
    origin = number * math.prod(shape[1:])
    for offsets, sizes, element in _cut(shape[1:], start - origin, stop - origin):
        yield [number, *offsets], [1, *sizes], origin + element


def chunks_of(shard: TensorShard, make: Callable[[], torch.Tensor]) -> Iterator[WriteChunk]:
    """Cut a shard along its first axis that is longer than 1.

    Args:
        shard: Its memory is not read.
        make: Returns the contents of the whole shard, when a chunk of it is to be written.
    """
    shape = list(shard.tensor.shape)
    axis = next((number for number, length in enumerate(shape) if length > 1), 0)
    step = max(
        1, shape[axis] * CHUNK_BYTES // max(1, shard.tensor.numel() * shard.tensor.dtype.itemsize)
    )
    for start in range(0, shape[axis], step):
        rows = min(step, shape[axis] - start)
        offsets, sizes = list(shard.global_offset), list(shape)
        offsets[axis], sizes[axis] = offsets[axis] + start, rows
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        data = TensorWriteData(
            chunk=chunk,
            properties=TensorProperties(dtype=shard.tensor.dtype),
            size=shard.global_shape,
        )
        item = WriteItem(
            index=MetadataIndex(shard.key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=data,
        )
        yield WriteChunk(item, partial(_rows, make, axis, start, rows))


def _rows(make: Callable[[], torch.Tensor], axis: int, start: int, count: int) -> torch.Tensor:
    return make().narrow(axis, start, count)


def object_chunks(entry: Any) -> Iterator[WriteChunk]:
    """Return a small object that one of Megatron's entries is saved as, which its own reader asks
    for; none if it is a tensor.
    """
    if isinstance(entry, ShardedObject):
        content = io.BytesIO()
        torch.save([entry.data], content)
        yield WriteChunk(
            WriteItem(MetadataIndex(entry.unique_key), WriteItemType.BYTE_IO), content.getvalue
        )

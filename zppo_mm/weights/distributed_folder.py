"""The files of a distributed checkpoint in megatron-core's format: chunks of tensors, and
`.metadata`, the location of each.

Written and read here through torch's own planner and reader, each rank its part, so that nothing
has to be gathered.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from zppo_mm.errors import CheckpointError, ZppoError
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.checkpoint_metadata import METADATA_FILE, check_files, one_line, read_metadata
from zppo_mm.weights.tensor_shards import TensorShard, WriteChunk

T = TypeVar("T")

COMMON_FILE = "common.pt"
_FITTING = "expected a complete checkpoint of this network; use another one"


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a rank has written of a checkpoint.

    Attributes:
        name: In the folder.
        size: Bytes.
        checksum: CRC-32.
        results: Location of each chunk in it.
    """

    name: str
    size: int
    checksum: int
    results: list[WriteResult]

    def to_json(self) -> str:
        """Return it as text for another rank."""
        locations = [
            (each.index.fqn, each.index.offset, each.storage_data.offset, each.size_in_bytes)
            for each in self.results
        ]
        return json.dumps([self.name, self.size, self.checksum, locations])

    @staticmethod
    def from_json(text: str) -> WrittenFile:
        """Return what `to_json` gave."""
        name, size, checksum, locations = json.loads(text)
        results = [
            WriteResult(
                MetadataIndex(key, None if offset is None else torch.Size(offset)),
                length,
                _StorageInfo(name, start, length),
            )
            for key, offset, start, length in locations
        ]
        return WrittenFile(name, size, checksum, results)


def on_every_rank(path: Path, action: Callable[[], T]) -> T:
    """Do something with files on every rank; returns this rank's result.

    Args:
        path: What is read or written, for the message.
        action: Calls no collective.

    Raises:
        CheckpointError: It failed on at least one rank; raised on all, so that none waits for
            another.
    """

    result: list[T] = []

    def attempt() -> ZppoError | None:
        try:
            result.append(action())
        except ZppoError as error:
            return error
        except OSError as error:
            return CheckpointError(
                f"{path}: the checkpoint's files cannot be used, got {error}, expected room and "
                "permission; check the disk"
            )
        return None

    problems = [problem for problem in parallel.on_all_ranks(attempt) if problem is not None]
    if problems:
        # One file that cannot be read now makes the damage of another uncertain.
        first = min(problems, key=lambda problem: type(problem) is not CheckpointError)
        raise first if isinstance(first, CheckpointError) else CheckpointError(str(first))
    return result[0]


def on_rank_0(path: Path, action: Callable[[], object]) -> None:
    """Do something with files on rank 0 alone, with the errors of `on_every_rank`."""
    on_every_rank(path, action if parallel.rank() == 0 else lambda: None)


def plan_writes(chunks: Sequence[WriteChunk]) -> tuple[list[WriteChunk], Metadata | None]:
    """Decide which rank writes which chunk; every rank calls it. Of a chunk that several have, the
    one with least to write so far.

    Args:
        chunks: What this rank has, those that all ranks have first, which is what evens the ranks
            out.

    Returns:
        What this rank writes, and on rank 0 the content of `.metadata`.

    Raises:
        CheckpointError: The chunks do not make up whole tensors; raised on every rank.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    plans: list[Any] | None = [None] * parallel.world_size() if parallel.rank() == 0 else None
    dist.gather_object(SavePlan([chunk.item for chunk in chunks]), plans)
    metadata, problem = None, None
    if plans is not None:
        try:
            plans, metadata = planner.create_global_plan(plans)
        except ValueError as error:
            problem = str(error)
    problem = parallel.broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(
            f"checkpoint: the shards of the ranks do not make up whole tensors, got {problem}; "
            "report this layout"
        )
    own: list[Any] = [None]
    dist.scatter_object_list(own, plans)
    wanted = {item.index for item in own[0].items}
    return [chunk for chunk in chunks if chunk.item.index in wanted], metadata


def write_chunks(chunks: list[WriteChunk], folder: Path) -> WrittenFile:
    """Write this rank's file and sync it. No other rank is waited for.

    Args:
        chunks: As of `write_to`.
        folder: Exists.

    Raises:
        OSError: There is no room or no permission.
    """
    with open(folder / own_file_name(), "wb") as stream:
        written = write_to(stream, chunks)
        stream.flush()
        os.fsync(stream.fileno())
    return written


def own_file_name() -> str:
    """Return the name of this rank's file."""
    return f"__{parallel.rank()}_0.distcp"


def write_to(stream: BinaryIO, chunks: list[WriteChunk]) -> WrittenFile:
    """Write the content of this rank's file; each chunk is released when it is written.

    Args:
        stream: Anything that takes bytes.
        chunks: From `plan_writes`; empty afterwards.
    """
    name = own_file_name()
    results, size, checksum = [], 0, 0
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        content = _serialised(chunk.content())
        stream.write(content)
        location = _StorageInfo(name, size, len(content))
        results.append(
            WriteResult(index=chunk.item.index, size_in_bytes=len(content), storage_data=location)
        )
        size, checksum = size + len(content), zlib.crc32(content, checksum)
    return WrittenFile(name, size, checksum, results)


def _serialised(content: torch.Tensor | bytes) -> memoryview | bytes:
    """Return what is written of a content. Saved straight to a file, a full disk would be an error
    without a name.
    """
    if isinstance(content, bytes):
        return content
    tensor = content.contiguous()
    # torch.save writes the whole storage of a view.
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    return _torch_saved(tensor)


def _torch_saved(content: object) -> memoryview:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def write_description(
    folder: Path, metadata: Metadata | None, files: Iterable[WrittenFile]
) -> None:
    """Write what makes the ranks' files a checkpoint, for megatron-core's own reader too; rank 0
    calls it.

    Args:
        folder: With all files.
        metadata: From `plan_writes`.
        files: Of all ranks.

    Raises:
        OSError: There is no room or no permission.
    """
    assert metadata is not None
    # Values that all ranks have in common, of which we have none there, and the format.
    (folder / COMMON_FILE).write_bytes(_torch_saved({}))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    FileSystemWriter(folder).finish(metadata, [file.results for file in files])


class DistributedFolder:
    """A distributed checkpoint to read from, saved at any layout and by any of the known versions
    of megatron-core.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: `.metadata` is damaged, is none, or would run code.
        OSError: It cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = read_metadata(folder / METADATA_FILE)
        check_files(folder, self._metadata)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)

    @property
    def tensor_keys(self) -> set[str]:
        """Names of the tensors."""
        return {
            key
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, shards: Sequence[TensorShard]) -> None:
        """Fill shards with what was saved, in their own types; no other rank is waited for.

        Raises:
            CheckpointError: A tensor is missing or another one, or a file cannot be read; named.
        """
        try:
            items = [
                item for number, shard in enumerate(shards) for item in self._items(number, shard)
            ]
            self._reader.read_data(LoadPlan(items), _FillShards(shards))
        except CheckpointError:
            raise
        except Exception as error:
            # torch's planner, reader and unpickler raise what they please on a forged description
            # and on bytes that are no tensor.
            raise CheckpointError(
                f"{self._folder}: the checkpoint cannot be read, got {one_line(error)}, {_FITTING}"
            ) from error

    def _items(self, number: int, shard: TensorShard) -> list[ReadItem]:
        """Return what to read for a shard, under its number: two shards may be the same part."""
        stored = self._metadata.state_dict_metadata.get(shard.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(
                f"{self._folder}: the tensor {shard.key} is missing, got {len(self.tensor_keys)} "
                f"others, {_FITTING}"
            )
        if stored.size != shard.global_shape:
            raise CheckpointError(
                f"{self._folder}: shape mismatch of the tensor {shard.key}, got "
                f"{list(stored.size)}, expected {list(shard.global_shape)}; use a checkpoint of "
                "this network"
            )
        items = create_read_items_for_chunk_list(
            shard.key, stored, [ChunkStorageMetadata(shard.global_offset, shard.tensor.size())]
        )
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != shard.tensor.numel():
            raise CheckpointError(
                f"{self._folder}: the tensor {shard.key} has holes or chunks twice, got {covered} "
                f"elements for a part, expected {shard.tensor.numel()}; use another checkpoint"
            )
        return [dataclasses.replace(item, dest_index=MetadataIndex(str(number))) for item in items]


class _FillShards(LoadPlanner):
    """Planner that gives torch's reader the part of a shard that a stored chunk fills."""

    def __init__(self, shards: Sequence[TensorShard]) -> None:
        self._shards = shards

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._shards[int(read_item.dest_index.fqn)].tensor
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(axis, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The reader has filled the shard itself."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("objects are not asked for: reading them could run code")

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the plan is made by hand")

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]

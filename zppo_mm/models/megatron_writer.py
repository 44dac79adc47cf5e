"""A Hugging Face folder's weights as a distributed checkpoint, each tensor read when it is its turn to be written."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from zppo_mm.models import parallel
from zppo_mm.models.megatron_folder import entry_with, first_failure, read_share, save_entries, source_dtype
from zppo_mm.models.safetensors_folder import SafetensorsFolder
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.models.weights import Mapping, parameter_mappings

COMMON_FILE = "common.pt"
PIECE_BYTES = 1 << 26
"""What is read at once when the checkpoint is loaded: a rank reads the pieces that overlap its share, each of them whole."""


def save_from_hf(model: VisionLanguageModel, source: SafetensorsFolder, folder: Path) -> None:
    """Write a Hugging Face folder's weights as a distributed checkpoint; every rank calls it and writes its share.

    Memory is bounded by the largest parameter.

    Args:
        model: From `build_without_weights`.
        source: A folder that fits it.
        folder: Exists and is empty.

    Raises:
        CheckpointError: A file could not be read or written; raised on every rank.
    """
    planner = _LazyPlanner(_shards(model, source))
    try:
        save_shards({}, storage_writer=_StreamWriter(folder), planner=planner)
    except CheckpointException as error:
        raise first_failure(error, folder, "expected a readable source and room on the disk; correct the cause and import again") from error
    if parallel.rank() == 0:
        # What megatron-core looks for beside the shards: values that all ranks have in common, of which weights have none, and the format.
        torch.save({}, folder / COMMON_FILE)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


@dataclasses.dataclass(frozen=True, slots=True)
class _Shard:
    """One piece of a file: a parameter's part, or a small object.

    Attributes:
        item: What the checkpoint's plan says about it.
        mapping: The parameter; `None` for an object.
        entry: How the parameter becomes parts.
        part: Which of them.
        rows: First row of the part and how many.
        content: The object, pickled.
    """

    item: WriteItem
    mapping: Mapping | None = None
    entry: Any = None
    part: int = 0
    rows: tuple[int, int] = (0, 0)
    content: bytes = b""


class _Shards(list[_Shard]):
    """This rank's shards, and how to make their contents."""

    def __init__(self, model: VisionLanguageModel, source: SafetensorsFolder) -> None:
        super().__init__()
        self._model, self._source = model, source
        self._made: tuple[str, list[torch.Tensor]] = ("", [])

    def content(self, shard: _Shard) -> torch.Tensor | io.BytesIO:
        if shard.mapping is None:
            return io.BytesIO(shard.content)
        # The parts of one parameter follow one another, so that its tensors are read once.
        if self._made[0] != shard.mapping.name:
            self._made = ("", [])
            share = read_share(self._model, shard.mapping, self._source)
            self._made = (shard.mapping.name, [part.data for part in _parts(entry_with(shard.entry, share))])
        assert shard.item.tensor_data is not None
        rows = self._made[1][shard.part].narrow(0, *shard.rows).reshape(shard.item.tensor_data.chunk.sizes).contiguous()
        # What is saved of a view is all that it looks at.
        return rows if rows.untyped_storage().nbytes() == rows.nbytes else rows.clone()


class _StreamWriter(FileSystemWriter):
    """Writes a rank's file content by content; torch's own keeps every tensor until its file is complete."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with open(Path(self.path) / name, "wb") as stream:
            for item in plan.items:
                start = stream.tell()
                _write_content(planner.resolve_data(item), stream)
                size = stream.tell() - start
                results.append(WriteResult(index=item.index, size_in_bytes=size, storage_data=_StorageInfo(name, start, size)))
            stream.flush()
            os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write_content(content: torch.Tensor | io.BytesIO, stream: IO[bytes]) -> None:
    """Write a content of which nothing is held afterwards, when the next one is made."""
    if isinstance(content, io.BytesIO):
        stream.write(content.getbuffer())
    else:
        torch.save(content, stream)


class _LazyPlanner(DefaultSavePlanner):
    """Plans from shards without contents and makes a content when it is asked for."""

    def __init__(self, shards: _Shards) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._by_index = {shard.item.index: shard for shard in shards}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([shard.item for shard in self._shards])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._shards.content(self._by_index[write_item.index])


def _shards(model: VisionLanguageModel, source: SafetensorsFolder) -> _Shards:
    """Return what this rank writes: of every replicated shard, one rank writes it."""
    shards = _Shards(model, source)
    entries = save_entries(model)
    for mapping in parameter_mappings(model):
        entry = entries.pop(mapping.name)
        if mapping.copied_from_embedding:
            continue
        share = torch.empty(mapping.parameter.shape, dtype=source_dtype(mapping, source), device="meta")
        for number, part in enumerate(_parts(entry_with(entry, share))):
            if is_main_replica(part.replica_id):
                shards.extend(_Shard(_tensor_item(part, rows), mapping, entry, number, rows) for rows in _pieces(part))
    for entry in entries.values():
        if isinstance(entry, ShardedObject) and is_main_replica(entry.replica_id):
            box = io.BytesIO()
            torch.save([entry.data], box)
            shards.append(_Shard(WriteItem(MetadataIndex(entry.unique_key), WriteItemType.BYTE_IO), content=box.getvalue()))
    return shards


def _parts(entry: Any) -> list[ShardedTensor]:
    """Return the tensors that an entry is saved as; a fused parameter is saved as its sections."""
    if isinstance(entry, ShardedTensorFactory):
        return list(nested_values([entry.build()]))
    return [entry]


def _pieces(part: ShardedTensor) -> list[tuple[int, int]]:
    """Cut a part into pieces of whole rows: the first row of each and how many."""
    num_rows = part.local_shape[0]
    size = math.prod(part.local_shape) * part.dtype.itemsize
    step = max(1, num_rows * PIECE_BYTES // size)
    return [(start, min(step, num_rows - start)) for start in range(0, num_rows, step)]


def _tensor_item(part: ShardedTensor, rows: tuple[int, int]) -> WriteItem:
    prepended = part.prepend_axis_num
    offsets, sizes = list(part.global_offset), [1] * prepended + list(part.local_shape)
    offsets[prepended], sizes[prepended] = offsets[prepended] + rows[0], rows[1]
    return WriteItem(
        index=MetadataIndex(part.key, torch.Size(offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
            properties=TensorProperties(dtype=part.dtype),
            size=torch.Size(part.global_shape),
        ),
    )

"""Weights in megatron-core's distributed format without the network that they belong to in memory.

The network is built without weights, to say which shard of which tensor goes where. Saving reads the tensors of a shard from a Hugging Face
folder when it is that shard's turn to be written; loading brings a few parameters at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from zppo_mm.config import ModelConfig, ParallelConfig
from zppo_mm.errors import CheckpointError, ModelError
from zppo_mm.models import parallel
from zppo_mm.models.architecture import Architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.safetensors_folder import SafetensorsFolder
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.models.weights import Mapping, cut, fuse_tensors, parameter_mappings, split_tensors

COMMON_FILE = "common.pt"


def build_without_weights(architecture: Architecture, layout: ParallelConfig) -> VisionLanguageModel:
    """Build this rank's stage with parameters that have shapes and no memory; process groups must be initialised.

    Raises:
        ModelError: The network cannot be split into this layout.
    """
    with _on_meta():
        return build_model(architecture, ModelConfig(transformer_impl="local", params_dtype="float32"), layout, trainable=False)


def source_dtype(mapping: Mapping, source: SafetensorsFolder) -> torch.dtype:
    """Return the narrowest type that holds all of a parameter's Hugging Face tensors exactly."""
    return functools.reduce(torch.promote_types, (source.dtype(key) for key in mapping.keys))


def check_shapes(mappings: Sequence[Mapping], source: SafetensorsFolder, architecture: Architecture) -> None:
    """Compare the folder's shapes with those that the parameters need.

    Raises:
        ModelError: One does not fit; file and key are named.
    """
    for mapping in mappings:
        full = list(mapping.parameter.shape)
        if mapping.rule.axis is not None:
            full[mapping.rule.axis] *= parallel.tensor_size()
        expected = split_tensors(torch.empty(full, device="meta"), mapping.rule, architecture)
        for key, tensor in zip(mapping.keys, expected, strict=True):
            if source.shape(key) != tuple(tensor.shape):
                raise ModelError(
                    f"{source.where(key)}: the shape of {key} does not fit, got {list(source.shape(key))}, expected {list(tensor.shape)} "
                    "from config.json; check that config.json and weights are of the same model"
                )


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
        save_shards({}, storage_writer=FileSystemWriter(folder), planner=planner)
    except CheckpointException as error:
        raise _first_failure(error, folder) from error
    if parallel.rank() == 0:
        # What megatron-core looks for beside the shards: values that all ranks have in common, of which weights have none, and the format.
        torch.save({}, folder / COMMON_FILE)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def with_weights(
    model: VisionLanguageModel, rounds: Sequence[Sequence[Mapping]], source: SafetensorsFolder, folder: Path
) -> Iterator[list[Mapping]]:
    """Yield the rounds' parameters with weights from a distributed checkpoint, one round in memory at a time; every rank goes along.

    Args:
        model: From `build_without_weights`.
        rounds: From `export.in_rounds`.
        source: Tells the types to load in.
        folder: The checkpoint, saved at any layout; more than weights may be in it.

    Raises:
        CheckpointError: It cannot be read or does not fit the network.
    """
    entries = _entries(model)
    for mappings in rounds:
        wanted = {}
        for mapping in mappings:
            dtype = source_dtype(mapping, source)
            wanted[mapping.name] = _with_data(entries[mapping.name], torch.empty(mapping.parameter.shape, dtype=dtype))
        try:
            # A part of the network is asked for, which megatron-core's own check of completeness does not expect.
            loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
        except CheckpointException as error:
            raise _first_failure(error, folder) from error
        except (dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{folder}: the weights cannot be loaded, got {type(error).__name__}: {error}, expected a complete checkpoint of this "
                "network; use another one"
            ) from error
        yield [dataclasses.replace(mapping, parameter=cast(nn.Parameter, loaded.pop(mapping.name))) for mapping in mappings]


@dataclasses.dataclass(frozen=True, slots=True)
class _Shard:
    """One piece of a file: a parameter's part, or a small object.

    Attributes:
        item: What the checkpoint's plan says about it.
        mapping: The parameter; `None` for an object.
        entry: How the parameter becomes parts.
        part: Which of them.
        content: The object, pickled.
    """

    item: WriteItem
    mapping: Mapping | None = None
    entry: Any = None
    part: int = 0
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
            self._made = (shard.mapping.name, [part.data for part in _parts(_with_data(shard.entry, share))])
        assert shard.item.tensor_data is not None
        return self._made[1][shard.part].reshape(shard.item.tensor_data.chunk.sizes).contiguous()


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
    entries = _entries(model)
    for mapping in parameter_mappings(model):
        entry = entries.pop(mapping.name)
        if mapping.copied_from_embedding:
            continue
        share = torch.empty(mapping.parameter.shape, dtype=source_dtype(mapping, source), device="meta")
        for number, part in enumerate(_parts(_with_data(entry, share))):
            if is_main_replica(part.replica_id):
                shards.append(_Shard(_tensor_item(part), mapping, entry, number))
    for entry in entries.values():
        if isinstance(entry, ShardedObject) and is_main_replica(entry.replica_id):
            box = io.BytesIO()
            torch.save([entry.data], box)
            shards.append(_Shard(WriteItem(MetadataIndex(entry.unique_key), WriteItemType.BYTE_IO), content=box.getvalue()))
    return shards


def _entries(model: VisionLanguageModel) -> dict[str, Any]:
    """Return how megatron-core would save everything of this stage, by the name on this rank."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    entries: dict[str, Any] = cast(Any, model).sharded_state_dict(metadata={"dp_cp_group": group})
    return entries


def _with_data(entry: Any, data: torch.Tensor) -> Any:
    """Return an entry for other contents of the same shape."""
    if isinstance(entry, ShardedTensorFactory):
        return dataclasses.replace(entry, data=data)
    return dataclasses.replace(entry, data=data, dtype=data.dtype)


def _parts(entry: Any) -> list[ShardedTensor]:
    """Return the tensors that an entry is saved as; a fused parameter is saved as its sections."""
    if isinstance(entry, ShardedTensorFactory):
        return list(nested_values([entry.build()]))
    return [entry]


def _tensor_item(part: ShardedTensor) -> WriteItem:
    offsets = torch.Size(part.global_offset)
    sizes = torch.Size((1,) * part.prepend_axis_num + tuple(part.local_shape))
    return WriteItem(
        index=MetadataIndex(part.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=part.dtype),
            size=torch.Size(part.global_shape),
        ),
    )


def read_share(model: VisionLanguageModel, mapping: Mapping, source: SafetensorsFolder) -> torch.Tensor:
    """Return this rank's share of a parameter, in the narrowest type that is exact."""
    dtype = source_dtype(mapping, source)
    tensors = [source.read(key).to(dtype) for key in mapping.keys]
    whole = fuse_tensors(tensors, mapping.rule, model.architecture)
    return cut(whole, mapping, model.architecture, parallel.tensor_rank(), parallel.tensor_size())


def _first_failure(error: CheckpointException, folder: Path) -> CheckpointError:
    """Say what the first rank that failed said."""
    rank, (cause, _trace) = sorted(error.failures.items())[0]
    if isinstance(cause, ModelError | CheckpointError):
        return CheckpointError(str(cause))
    return CheckpointError(
        f"{folder}: the checkpoint cannot be used, got {type(cause).__name__}: {cause} on rank {rank}, expected complete files and room on "
        "the disk; correct the cause and try again"
    )


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Inside the block, parameters get a shape and no memory; buffers are real.

    `torch.device("meta")` would take the values of small tables too, which modules fill and read while they are made.
    """
    register, all_reduce = nn.Module.register_parameter, dist.all_reduce

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    def skip_shapes(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron-core adds up the two copies of a tied embedding while it builds the stages; without weights there is nothing to add.
        return None if tensor.is_meta else all_reduce(tensor, *args, **kwargs)

    patched: Any = nn.Module
    groups: Any = dist
    patched.register_parameter, groups.all_reduce = register_shape, skip_shapes
    try:
        yield
    finally:
        patched.register_parameter, groups.all_reduce = register, all_reduce

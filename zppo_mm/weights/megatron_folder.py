"""Weights in megatron-core's distributed format without the network that they belong to in memory.

The network is built without weights, to say which shard of which tensor goes where; loading brings
a few parameters at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import nn

from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.distributed_folder import DistributedFolder, on_every_rank
from zppo_mm.weights.mapping import Mapping, cut, fuse_tensors, split_tensors
from zppo_mm.weights.safetensors_folder import SafetensorsFolder
from zppo_mm.weights.tensor_shards import shards_of


def build_without_weights(
    architecture: Architecture, layout: ParallelConfig
) -> VisionLanguageModel:
    """Build this rank's stage with parameters that have shapes and no memory; process groups must
    be initialised.

    Raises:
        ModelError: The network cannot be split into this layout.
    """
    with _on_meta():
        return build_model(
            architecture,
            ModelConfig(transformer_impl="local", params_dtype="float32"),
            layout,
            trainable=False,
        )


def source_dtype(mapping: Mapping, source: SafetensorsFolder) -> torch.dtype:
    """Return the narrowest type that holds all of a parameter's Hugging Face tensors exactly."""
    return functools.reduce(torch.promote_types, (source.dtype(key) for key in mapping.keys))


def check_shapes(
    mappings: Sequence[Mapping], source: SafetensorsFolder, architecture: Architecture
) -> None:
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
                    f"{source.where(key)}: the shape of {key} does not fit, got "
                    f"{list(source.shape(key))}, expected {list(tensor.shape)} from config.json; "
                    "check that config.json and weights are of the same model"
                )


def with_weights(
    model: VisionLanguageModel,
    rounds: Sequence[Sequence[Mapping]],
    source: SafetensorsFolder,
    folder: Path,
) -> Iterator[list[Mapping]]:
    """Yield the rounds' parameters with weights from a distributed checkpoint, one round in memory
    at a time; every rank goes along.

    Args:
        model: From `build_without_weights`.
        rounds: From `export.in_rounds`.
        source: Has the types to load in.
        folder: The checkpoint, saved at any layout; more than weights may be in it.

    Raises:
        CheckpointError: It cannot be read or does not fit the network.
    """
    entries = save_entries(model)
    opened = on_every_rank(folder, partial(DistributedFolder, folder))
    for mappings in rounds:
        filled, shards = [], []
        for mapping in mappings:
            weight = torch.empty(mapping.parameter.shape, dtype=source_dtype(mapping, source))
            shards += shards_of(entry_with(entries[mapping.name], weight))
            filled.append(dataclasses.replace(mapping, parameter=cast(nn.Parameter, weight)))
        on_every_rank(folder, partial(opened.read, shards))
        yield filled
        # Whoever asks for the next round still holds this one.
        filled.clear()
        shards.clear()


def save_entries(module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Return how megatron-core would save everything of this stage, by the name on this rank; the
    entries hold the parameters themselves.

    Args:
        module: A stage, or a part of one.
        prefix: Name of the part in the stage, with a dot.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    entries: dict[str, Any] = cast(Any, module).sharded_state_dict(
        prefix, metadata={"dp_cp_group": group}
    )
    return entries


def entry_with(entry: Any, data: torch.Tensor) -> Any:
    """Return an entry for other contents of the same shape."""
    if isinstance(entry, ShardedTensorFactory):
        return dataclasses.replace(entry, data=data)
    # megatron-core would let an embedding of another length pass and fill it up with zeros.
    return dataclasses.replace(entry, data=data, dtype=data.dtype, allow_shape_mismatch=False)


def read_shard(
    model: VisionLanguageModel, mapping: Mapping, source: SafetensorsFolder
) -> torch.Tensor:
    """Return this rank's shard of a parameter, in the narrowest type that is exact."""
    dtype = source_dtype(mapping, source)
    tensors = [source.read(key).to(dtype) for key in mapping.keys]
    whole = fuse_tensors(tensors, mapping.rule, model.architecture)
    return cut(whole, mapping, model.architecture, parallel.tensor_rank(), parallel.tensor_size())


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Inside the block, parameters get a shape and no memory; buffers are real.

    `torch.device("meta")` would take the values of small tables too, which modules fill and read
    while they are made.
    """
    register, all_reduce = nn.Module.register_parameter, dist.all_reduce

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    def skip_shapes(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron-core adds up the two copies of a tied embedding while it builds the stages;
        # without weights there is nothing to add.
        return None if tensor.is_meta else all_reduce(tensor, *args, **kwargs)

    patched: Any = nn.Module
    groups: Any = dist
    patched.register_parameter, groups.all_reduce = register_shape, skip_shapes
    try:
        yield
    finally:
        patched.register_parameter, groups.all_reduce = register, all_reduce

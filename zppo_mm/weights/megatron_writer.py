"""A Hugging Face folder's weights as a distributed checkpoint, each tensor read when it is its turn
to be written.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.distributed_folder import (
    on_every_rank,
    on_rank_0,
    plan_writes,
    write_chunks,
    write_description,
)
from zppo_mm.weights.mapping import Mapping, parameter_mappings
from zppo_mm.weights.megatron_folder import entry_with, read_shard, save_entries, source_dtype
from zppo_mm.weights.safetensors_folder import SafetensorsFolder
from zppo_mm.weights.tensor_shards import (
    TensorShard,
    WriteChunk,
    chunks_of,
    object_chunks,
    shards_of,
)


def save_from_hf(model: VisionLanguageModel, source: SafetensorsFolder, folder: Path) -> None:
    """Write a Hugging Face folder's weights as a distributed checkpoint; every rank calls it and
    writes its shards.

    Memory is bounded by the largest parameter.

    Args:
        model: From `build_without_weights`.
        source: A folder that fits it.
        folder: Exists and is empty.

    Raises:
        CheckpointError: A file could not be read or written; raised on every rank.
    """
    chunks, metadata = plan_writes(_chunks(model, source))
    files = parallel.gather_from_ranks(on_every_rank(folder, partial(write_chunks, chunks, folder)))
    on_rank_0(folder, partial(write_description, folder, metadata, files))


class _Parameters:
    """Makes the shards of parameters. Those of one parameter follow one another, so its tensors are
    read once.
    """

    def __init__(self, model: VisionLanguageModel, source: SafetensorsFolder) -> None:
        self._model, self._source = model, source
        self._made: tuple[str, list[TensorShard]] = ("", [])

    def contents(self, mapping: Mapping, entry: object, number: int) -> torch.Tensor:
        if self._made[0] != mapping.name:
            self._made = ("", [])
            self._made = (
                mapping.name,
                shards_of(entry_with(entry, read_shard(self._model, mapping, self._source))),
            )
        return self._made[1][number].tensor


def _chunks(model: VisionLanguageModel, source: SafetensorsFolder) -> list[WriteChunk]:
    """Return what this rank could write."""
    parameters, entries = _Parameters(model, source), save_entries(model)
    chunks: list[WriteChunk] = []
    for mapping in parameter_mappings(model):
        entry = entries.pop(mapping.name)
        if mapping.copied_from_embedding:
            continue
        shard_of_parameter = torch.empty(
            mapping.parameter.shape, dtype=source_dtype(mapping, source), device="meta"
        )
        for number, shard in enumerate(shards_of(entry_with(entry, shard_of_parameter))):
            chunks.extend(chunks_of(shard, partial(parameters.contents, mapping, entry, number)))
    chunks.extend(chunk for entry in entries.values() for chunk in object_chunks(entry))
    return chunks

"""A Hugging Face folder's weights as a distributed checkpoint, each tensor read when it is its turn
to be written.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.boxes import Box, Piece, boxes_of, object_pieces, pieces_of
from zppo_mm.weights.distributed_folder import (
    on_every_rank,
    on_rank_0,
    share_out,
    write_description,
    write_pieces,
)
from zppo_mm.weights.mapping import Mapping, parameter_mappings
from zppo_mm.weights.megatron_folder import entry_with, read_share, save_entries, source_dtype
from zppo_mm.weights.safetensors_folder import SafetensorsFolder


def save_from_hf(model: VisionLanguageModel, source: SafetensorsFolder, folder: Path) -> None:
    """Write a Hugging Face folder's weights as a distributed checkpoint; every rank calls it and
    writes its share.

    Memory is bounded by the largest parameter.

    Args:
        model: From `build_without_weights`.
        source: A folder that fits it.
        folder: Exists and is empty.

    Raises:
        CheckpointError: A file could not be read or written; raised on every rank.
    """
    pieces, metadata = share_out(_pieces(model, source))
    files = parallel.gather_from_ranks(on_every_rank(folder, partial(write_pieces, pieces, folder)))
    on_rank_0(folder, partial(write_description, folder, metadata, files))


class _Parameters:
    """Makes the boxes of parameters. Those of one parameter follow one another, so that its tensors
    are read once.
    """

    def __init__(self, model: VisionLanguageModel, source: SafetensorsFolder) -> None:
        self._model, self._source = model, source
        self._made: tuple[str, list[Box]] = ("", [])

    def contents(self, mapping: Mapping, entry: object, number: int) -> torch.Tensor:
        if self._made[0] != mapping.name:
            self._made = ("", [])
            self._made = (
                mapping.name,
                boxes_of(entry_with(entry, read_share(self._model, mapping, self._source))),
            )
        return self._made[1][number].tensor


def _pieces(model: VisionLanguageModel, source: SafetensorsFolder) -> list[Piece]:
    """Return what this rank could write."""
    parameters, entries = _Parameters(model, source), save_entries(model)
    pieces: list[Piece] = []
    for mapping in parameter_mappings(model):
        entry = entries.pop(mapping.name)
        if mapping.copied_from_embedding:
            continue
        share = torch.empty(
            mapping.parameter.shape, dtype=source_dtype(mapping, source), device="meta"
        )
        for number, box in enumerate(boxes_of(entry_with(entry, share))):
            pieces.extend(pieces_of(box, partial(parameters.contents, mapping, entry, number)))
    pieces.extend(piece for entry in entries.values() for piece in object_pieces(entry))
    return pieces

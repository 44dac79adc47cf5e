"""Checks of imported folders that run on any layout."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state

from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.weights.mapping import parameter_mappings


def content(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_opens(folder: Path, loaded: VisionLanguageModel, layout: ParallelConfig) -> None:
    """Open a distributed checkpoint as training does, small objects and all, and compare bit for
    bit with a loaded network.
    """
    other = build_model(loaded.architecture, ModelConfig(transformer_impl="local"), layout)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(float("nan"))
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    other.load_state_dict(
        dist_checkpointing.load(other.sharded_state_dict(metadata=metadata), str(folder)),
        strict=False,
    )
    for found, mapping in zip(other.parameters(), parameter_mappings(loaded), strict=True):
        assert found.equal(mapping.parameter), mapping.name

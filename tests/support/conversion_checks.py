"""Checks of imported folders that run on any layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file, save_file

from tests.support import tiny_qwen
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.weights.mapping import parameter_mappings
from zppo_mm.weights.safetensors_folder import SafetensorsFolder


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


LAYOUT = ParallelConfig()


def released(path: Path) -> Path:
    """Save a tied folder as models are released: several files, mixed types, weights outside the
    network, files in folders.
    """
    model = tiny_qwen.vision_language_model(tied=True).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="200KB")
    files = sorted(path.glob("*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in files:
        # Values that bfloat16 does not have.
        tensors = {
            key: tensor.float() * 1.001
            if key.endswith(("A_log", "linear_attn.norm.weight"))
            else tensor
            for key, tensor in load_file(file).items()
        }
        if file == files[-1]:
            tensors["mtp.fc.weight"] = torch.randn(4, 8)
        save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"]["mtp.fc.weight"] = files[-1].name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "assets").mkdir()
    (path / "assets" / "preprocessor.json").write_text('{ "odd":   "spacing" }')
    return path


def left_whole(folder: Path) -> list[Path]:
    """Return the folders in here that a reader would take for a model."""
    whole = []
    for path in folder.rglob("*"):
        if path.is_dir() and (path / "config.json").is_file():
            try:
                SafetensorsFolder(path)
            except ModelError:
                continue
            whole.append(path)
    return whole

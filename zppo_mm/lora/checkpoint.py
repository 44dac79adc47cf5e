"""Adapters out of a run's checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zppo_mm.errors import CheckpointError
from zppo_mm.lora.adapters import adapters_of
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.weights.distributed_folder import DistributedFolder, on_every_rank
from zppo_mm.weights.mapping import ADAPTERS
from zppo_mm.weights.megatron_folder import save_entries
from zppo_mm.weights.tensor_shards import shards_of


def load_adapters(model: VisionLanguageModel, folder: Path) -> None:
    """Replace a network's adapters by a checkpoint's, in float32; every rank calls it.

    Args:
        model: From `build_without_weights`; without adapters nothing happens.
        folder: The checkpoint, saved at any layout.

    Raises:
        CheckpointError: The adapters cannot be read or are others.
    """
    adapters = adapters_of(model)
    if adapters is None:
        return
    for target in adapters.targets():
        for half in ("lora_A", "lora_B"):
            setattr(
                target,
                half,
                nn.Parameter(torch.empty(target.get_parameter(half).shape), requires_grad=False),
            )
    shards = [
        shard for entry in save_entries(adapters, ADAPTERS).values() for shard in shards_of(entry)
    ]
    try:
        on_every_rank(folder, lambda: DistributedFolder(folder).read(shards))
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: the adapters cannot be loaded, got {error}; expected those that "
            "config.yaml describes; use another checkpoint"
        ) from error

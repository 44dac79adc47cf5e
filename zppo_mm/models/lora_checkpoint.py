"""Adapters out of a run's checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from zppo_mm.errors import CheckpointError
from zppo_mm.models.lora import adapters_of
from zppo_mm.models.megatron_versions import load_checkpoint
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.models.weights import ADAPTERS


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
            setattr(target, half, nn.Parameter(torch.empty(target.get_parameter(half).shape), requires_grad=False))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        loaded = load_checkpoint(
            adapters.sharded_state_dict(ADAPTERS, metadata={"dp_cp_group": group}), folder, validate_access_integrity=False
        )
    except (CheckpointException, dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError, OSError) as error:
        # torch puts the cause on the last line, below the traces of all ranks.
        cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(
            f"{folder}: the adapters cannot be loaded, got {cause}, expected those that config.yaml describes; use another checkpoint"
        ) from error
    adapters.load_state_dict({name.removeprefix(ADAPTERS): tensor for name, tensor in loaded.items() if name.startswith(ADAPTERS)})

"""Adapters out of a run's checkpoint into weights that are read from it parameter by parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import nn

from zppo_mm.errors import CheckpointError
from zppo_mm.models.boxes import boxes_of
from zppo_mm.models.distributed_folder import DistributedFolder, on_every_rank
from zppo_mm.models.lora import LoraAdapters, adapters_of
from zppo_mm.models.megatron_folder import save_entries
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.models.weights import ADAPTERS, Mapping


def merge_adapters(model: VisionLanguageModel, rounds: Iterable[list[Mapping]], folder: Path) -> Iterator[list[Mapping]]:
    """Yield rounds of parameters with the checkpoint's adapters merged into them; every rank goes along.

    Args:
        model: From `build_without_weights`, with adapters if the run had any; without, the rounds pass as they are.
        rounds: Parameters with weights from the checkpoint.
        folder: The checkpoint, saved at any layout.

    Raises:
        CheckpointError: The adapters cannot be read or are others.
    """
    adapters = adapters_of(model)
    if adapters is None:
        yield from rounds
        return
    _load(adapters, folder)
    for mappings in rounds:
        yield [_merged(adapters, mapping) for mapping in mappings]


def _merged(adapters: LoraAdapters, mapping: Mapping) -> Mapping:
    branch = adapters.branches.get(mapping.name)
    if branch is None:
        return mapping
    return dataclasses.replace(mapping, parameter=cast(nn.Parameter, branch.merged_weight(mapping.parameter)))


def _load(adapters: LoraAdapters, folder: Path) -> None:
    """Replace all adapters by the checkpoint's, in float32."""
    for target in adapters.targets():
        for half in ("lora_A", "lora_B"):
            setattr(target, half, nn.Parameter(torch.empty(target.get_parameter(half).shape), requires_grad=False))
    boxes = [box for entry in save_entries(adapters, ADAPTERS).values() for box in boxes_of(entry)]
    try:
        on_every_rank(folder, lambda: DistributedFolder(folder).read(boxes))
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: the adapters cannot be loaded, got {error}; expected those that config.yaml describes; use another checkpoint"
        ) from error

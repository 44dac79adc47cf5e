"""What trains and what it costs: parameters and bytes of every part of the network, over all
ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import nn

from zppo_mm.lora.adapters import adapters_of
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.text_table import text_table
from zppo_mm.weights.mapping import parameter_mappings

logger = logging.getLogger(__name__)
_MOMENT_BYTES = {"float32": 4, "bfloat16": 2}
_MASTER_BYTES = 4
"""Of the float32 copy of a weight that is coarser."""


@dataclass(frozen=True, slots=True)
class PartSize:
    """One part of the network, without the copies that other ranks hold of the same parameter.

    Attributes:
        parameters: All of them.
        trainable: Those that the optimizer updates.
        weight_bytes: Of all parameters.
        gradient_bytes: Of the gradient buffers.
        optimizer_bytes: Of AdamW's two moments, and of the float32 copy of weights that are
            coarser.
    """

    parameters: int = 0
    trainable: int = 0
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0

    def __add__(self, other: PartSize) -> PartSize:
        return PartSize(
            *(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))
        )


def part_sizes(model: VisionLanguageModel, moments_dtype: str = "float32") -> dict[str, PartSize]:
    """Return the sizes of the parts that the network has, the same on every rank; every rank calls
    this.

    Args:
        model: This rank's stage, wrapped: its trainable parameters have gradient buffers.
        moments_dtype: `train.optimizer_state_dtype`.
    """
    names = ("vision", "projector", "language") if model.architecture.has_vision else ("language",)
    parts = {part: list(model.parameters_of(part)) for part in names}
    adapters = adapters_of(model)
    if adapters is not None:
        parts["lora"] = list(adapters.parameters())
    copies = {
        id(mapping.parameter)
        for mapping in parameter_mappings(model)
        if mapping.copied_from_embedding
    }
    mine = {
        part: _size(
            [parameter for parameter in own if id(parameter) not in copies],
            _MOMENT_BYTES[moments_dtype],
        )
        for part, own in parts.items()
    }
    gathered = parallel.gather_from_ranks(mine if parallel.replica_rank() == 0 else {})
    return {part: sum((sizes[part] for sizes in gathered if sizes), PartSize()) for part in parts}


def log_part_sizes(model: VisionLanguageModel, moments_dtype: str) -> None:
    """Write the table to rank 0's log; every rank calls this."""
    sizes = part_sizes(model, moments_dtype)
    if parallel.rank() == 0:
        logger.info("what trains:\n%s", table(sizes))


def table(sizes: dict[str, PartSize]) -> str:
    """Return one line per part and one for all, under a heading."""
    rows = []
    for name, size in [*sizes.items(), ("all", sum(sizes.values(), PartSize()))]:
        memory = (size.weight_bytes, size.gradient_bytes, size.optimizer_bytes)
        rows.append(
            [name, f"{size.parameters:,}", f"{size.trainable:,}", *map(_bytes_text, memory)]
        )
    return text_table(["", "parameters", "trainable", "weights", "gradients", "optimizer"], rows)


def _size(parameters: Iterable[nn.Parameter], moment_bytes: int) -> PartSize:
    """Add up this rank's shards, and on tensor rank 0 the replicated parameters."""
    total = PartSize()
    for parameter in parameters:
        if not (getattr(parameter, "tensor_model_parallel", False) or parallel.tensor_rank() == 0):
            continue
        count, trainable = parameter.numel(), parameter.numel() if parameter.requires_grad else 0
        gradient = cast(Any, parameter).main_grad.element_size() if trainable else 0
        state = 2 * moment_bytes + (0 if parameter.dtype == torch.float32 else _MASTER_BYTES)
        total += PartSize(
            count,
            trainable,
            count * parameter.element_size(),
            trainable * gradient,
            trainable * state,
        )
    return total


def _bytes_text(count: int) -> str:
    """Write bytes with a unit of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"

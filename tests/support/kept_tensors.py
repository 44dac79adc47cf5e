"""Counts the bytes that autograd keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages, each once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def kept_by_backward(model: Any, tokens: int) -> int:
    """Return the bytes that autograd keeps of a pack of one sequence, beside the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor)
        return tensor

    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    positions = torch.arange(tokens).expand(3, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.arange(tokens) % 4000, positions, bounds, output_layer=False)
    return size_of(kept)

"""The protocol of adapters that the network, its decoding and its export use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, slots=True)
class DecodeAdapters:
    """All adapters of one linear, as a decoding step uses them.

    Attributes:
        down: `[sum of ranks, inputs]`, this rank's shard of the inputs.
        up: `[outputs, sum of ranks]`, this rank's shard of the outputs.
        scale: Of what they add.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def add_to(self, output: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        """Add to `[batch, outputs]`, in place, what the adapters make of `[batch, sum of ranks]`,
        the product of inputs and `down`.

        Every product is rounded where the training forward pass rounds it: what small adapters add
        is below a step of the type.
        """
        return output.add_(F.linear(narrow * self.scale, self.up))


class AdapterBranch(Protocol):
    """What is added to the output of one Megatron linear."""

    linear: nn.Module

    def delta_weight(self) -> torch.Tensor:
        """Return what this rank's weight changes by, float32 `[rows, inputs]`."""
        ...

    def for_decoding(self) -> DecodeAdapters:
        """Return the adapters as they are now."""
        ...


class Adapters(Protocol):
    """All adapters of a rank's stage.

    Attributes:
        branches: By the name of the Megatron weight.
    """

    branches: Mapping[str, AdapterBranch]


def is_adapted(model: nn.Module) -> bool:
    """Return whether a network has adapters."""
    return getattr(model, "lora", None) is not None


def adapter_branches(model: nn.Module) -> Mapping[str, AdapterBranch]:
    """Return the adapters of this rank's stage by the name of the Megatron weight; nothing if there
    are none.
    """
    adapters = cast("Adapters | None", getattr(model, "lora", None))
    return adapters.branches if adapters is not None else {}


def decode_adapters(model: nn.Module) -> dict[nn.Module, DecodeAdapters]:
    """Return the adapters by their linears as they are now, for a loop of decoding; nothing if
    there are none.
    """
    return {branch.linear: branch.for_decoding() for branch in adapter_branches(model).values()}

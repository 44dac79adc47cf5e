"""Root-mean-square normalisation with the options that megatron-core's local layers lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.Module):
    """RMSNorm computed in float32, zero-centred on request of the config (the weight is stored
    minus one).

    megatron-core's wrapper of torch's norm refuses zero-centred weights and sequence parallelism.

    Args:
        config: Says whether weights are zero-centred and activations sharded over the sequence.
        hidden_size: Width of the last axis.
        eps: Added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        self.eps = eps
        initial = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(
            initial(hidden_size, dtype=config.params_dtype, device=parameter_device(config))
        )
        # Read by finalize_model_grads, which then sums the gradient over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def scale(self) -> torch.Tensor:
        """Return what the normalised values are multiplied with, `[hidden_size]` float32."""
        weight = self.weight.float()
        return weight + 1.0 if self.zero_centered else weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `[..., hidden_size]`."""
        scale = self.scale()
        return F.rms_norm(hidden.float(), (scale.shape[0],), scale, self.eps).to(hidden.dtype)


def parameter_device(config: TransformerConfig) -> torch.device:
    """Return where a module builds its own parameters, as megatron-core's linear layers do."""
    return (
        torch.device("cpu")
        if config.use_cpu_initialization
        else torch.device("cuda", torch.cuda.current_device())
    )


class GatedRMSNorm(nn.Module):
    """RMSNorm of each head's output, times the gate's SiLU. The weight is one-centred and stays
    float32.

    Args:
        config: Where and how the parameters are built.
        hidden_size: Width of a head.
        eps: Added to the mean square.
        tensor_size: Tensor-parallel ranks; each normalises its own heads with the same weight.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, tensor_size: int
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=torch.float32, device=parameter_device(config))
        )
        # Each rank's gradient covers its own heads. Megatron sums over ranks only what is marked
        # sequence-parallel, and only when that is on.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight.sum_gradients_across_tp = tensor_size > 1 and not config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Normalise `[tokens, heads, head_dim]` (float32) and gate it; the result has the gate's
        type.
        """
        normed = F.rms_norm(output, (output.shape[-1],), self.weight, self.eps)
        return (normed * F.silu(gate.float())).to(gate.dtype)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> GatedRMSNorm:
        return apply_keeping_float32(self, ("weight",), super()._apply, fn, recurse)  # type: ignore[return-value]


def apply_keeping_float32(
    module: nn.Module,
    names: tuple[str, ...],
    apply: Callable[..., nn.Module],
    fn: Callable[[torch.Tensor], torch.Tensor],
    recurse: bool,
) -> nn.Module:
    """Move or cast a module, the named parameters only moved."""
    kept = {name: module.get_parameter(name).data for name in names}
    apply(fn, recurse)
    for name, data in kept.items():
        parameter = module.get_parameter(name)
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
    return module

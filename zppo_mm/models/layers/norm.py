"""Root-mean-square normalisation with the options that megatron-core's local layers lack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.Module):
    """RMSNorm computed in float32, zero-centred where the config says so (the weight is stored
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

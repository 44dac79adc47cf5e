"""Which of megatron-core's fused kernels a network uses, by what is installed and where it runs.

megatron-core has further fusions, of the rotary embedding, the persistent layer norm, the masked
softmax and the cross-entropy. They belong to modules that this network does not use: its rotation
takes a table of three axes per pack, its norms are RMSNorms, its attention is torch's, and its loss
is computed in chunks from the hidden states.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import Adam
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from zppo_mm.models.specs import Implementation
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.gpu_packages import GpuPackages, find_gpu_packages
from zppo_mm.text_table import text_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fusions:
    """What is fused; nothing by default.

    Attributes:
        gradient_accumulation: The matrix product of a weight's gradient adds to the float32 buffer
            at once, instead of writing a gradient that is added afterwards.
        activation: SwiGLU is one kernel, and its backward pass keeps only its input.
        residual: The addition to the residual stream is one kernel.
    """

    gradient_accumulation: bool = False
    activation: bool = False
    residual: bool = False

    def options(self) -> dict[str, Any]:
        """Return them by the names of megatron-core's configuration."""
        return {
            "gradient_accumulation_fusion": self.gradient_accumulation,
            "bias_activation_fusion": self.activation,
            "bias_dropout_fusion": self.residual,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "masked_softmax_fusion": False,
            "cross_entropy_loss_fusion": False,
        }


def choose_fusions(
    packages: GpuPackages, device: torch.device, implementation: Implementation, trainable: bool
) -> Fusions:
    """Choose what is fused; nothing on a CPU.

    Args:
        packages: What is installed.
        device: Where the network is computed.
        implementation: Of its layers. Transformer Engine's accumulate gradients themselves,
            megatron-core's own through a kernel of Apex.
        trainable: Whether gradients are computed.
    """
    if device.type != "cuda":
        return Fusions()
    can_accumulate = implementation == "transformer_engine" or packages.apex_accumulates
    # Both are Python functions that torch compiles, for which it needs triton.
    compiles = bool(packages.triton)
    return Fusions(trainable and can_accumulate, compiles, compiles)


def log_packages(network: MegatronModule) -> None:
    """Write to rank 0's log what a network is trained with on a GPU."""
    if parallel.rank() == 0 and parallel.device().type == "cuda":
        has_kernels = (getattr(each, "fused_kernels", None) for each in network.modules())
        table = packages_table(
            find_gpu_packages(), network.config, any(has_kernels), Adam.__module__
        )
        logger.info("computed with:\n%s", table)


def packages_table(
    packages: GpuPackages, config: TransformerConfig, delta_kernels: bool, optimizer: str
) -> str:
    """Return what a network is computed and trained with, package by package.

    Args:
        packages: What is installed.
        config: Of the network.
        delta_kernels: Whether its DeltaNet layers use flash-linear-attention.
        optimizer: Module of the class that updates the weights.
    """
    accumulates = config.gradient_accumulation_fusion
    fused = config.transformer_impl == "transformer_engine"
    used_for = {
        "Transformer Engine": {
            "layers": fused,
            "weight gradients": fused and accumulates,
            "optimizer": optimizer.startswith("transformer_engine."),
        },
        "NVIDIA Apex": {
            "weight gradients": accumulates and not fused,
            "optimizer": optimizer.startswith("apex."),
        },
        "flash-linear-attention": {"DeltaNet": delta_kernels},
        "triton": {"SwiGLU": config.bias_activation_fusion, "residual": config.bias_dropout_fusion},
    }
    versions = (
        packages.transformer_engine,
        packages.apex,
        packages.flash_linear_attention,
        packages.triton,
    )
    rows = [
        [name, version or "-", ", ".join(use for use, is_used in uses.items() if is_used) or "-"]
        for (name, uses), version in zip(used_for.items(), versions, strict=True)
    ]
    return text_table(["package", "version", "used for"], rows, num_left=3)

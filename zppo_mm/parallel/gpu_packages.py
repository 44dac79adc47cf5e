"""Optional packages for GPUs: which are installed, and that they stay out of the way elsewhere."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib import metadata

import torch

_REPLACING_TORCH = (
    *("transformer_engine", "transformer_engine_torch"),
    *("apex", "amp_C", "fused_weight_gradient_mlp_cuda"),
)
"""What megatron-core takes instead of torch's own as soon as it can be imported."""


def hide_without_gpu() -> None:
    """Keep packages that need a GPU from being imported where there is none.

    megatron-core clips gradients and updates weights with their kernels as soon as they can be
    imported, CPU tensors too, which raises. Must come before megatron-core's first import; what
    was imported already is left alone.
    """
    if not torch.cuda.is_available():
        for name in _REPLACING_TORCH:
            # An import of it raises ModuleNotFoundError then.
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class GpuPackages:
    """Versions of the optional packages for GPUs; empty where one is missing or does not load.

    Attributes:
        transformer_engine: Its PyTorch part.
        apex: NVIDIA's Apex, with its multi-tensor kernels. The package of that name in the registry
            is another project.
        apex_accumulates: Whether Apex was built with the kernel that adds a weight's gradient to
            its buffer.
        flash_linear_attention: Kernels of DeltaNet.
        triton: What `torch.compile` writes kernels for a GPU with.
    """

    transformer_engine: str = ""
    apex: str = ""
    apex_accumulates: bool = False
    flash_linear_attention: str = ""
    triton: str = ""


def find_gpu_packages() -> GpuPackages:
    """Return what can be used here; nothing without a GPU."""
    if not torch.cuda.is_available():
        return GpuPackages()
    return GpuPackages(
        transformer_engine=_version("transformer-engine", "transformer_engine.pytorch"),
        apex=_version("apex", "amp_C"),
        apex_accumulates=bool(_version("apex", "fused_weight_gradient_mlp_cuda")),
        flash_linear_attention=_version("flash-linear-attention", "fla"),
        triton=_version("triton", "triton"),
    )


def _version(distribution: str, module: str) -> str:
    """Return the version of a distribution, if the module that is needed of it can be imported."""
    try:
        importlib.import_module(module)
    except Exception:
        # A package built for another CUDA raises OSError, one without its torch part RuntimeError.
        return ""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"

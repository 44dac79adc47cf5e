"""Settings of the tests on a GPU."""

from __future__ import annotations

from encoders.torch_kernels import import_on_torch

# Before anything takes it with kernels: the oracle is transformers on the CPU.
import_on_torch("transformers.models.qwen3_5.modeling_qwen3_5")

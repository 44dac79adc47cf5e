"""Sections of a run's configuration that say which networks there are, how they are laid out, and
what is trained of them.

`zppo_mm.config.schema` puts them together with the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ModelConfig:
    """Student and the network's implementation."""

    student: str = ""
    """Hugging Face folder of the student; empty means the bundled tiny student."""
    transformer_impl: str = "auto"
    """`local`, `transformer_engine`, or `auto`: Transformer Engine where it is installed and a GPU
    is there.
    """
    params_dtype: str = "auto"
    """`float32`, `bfloat16`, or `auto`: bfloat16 on a GPU, float32 without."""
    fp8: str = ""
    """FP8 format (`e4m3` or `hybrid`) of the language model's linears; empty is off. Needs
    Transformer Engine and a GPU.
    """
    fp8_recipe: str = "tensorwise"
    """Transformer Engine's FP8 recipe: delayed, tensorwise, blockwise, mxfp8."""
    recompute: str = "none"
    """Activation recomputation of the language model: none, selective, full."""


@dataclass(kw_only=True)
class ParallelConfig:
    """Megatron's parallel layout; what is left of the world size is data parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of every training pack, for long responses; each samples as a
    replica of its own.
    """
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions over the sequence."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    timeout_minutes: float = 10.0
    """Time after which a collective that waits for a lost rank fails."""


LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    "out_proj",
)
"""Linears of the language model that may have adapters, by their Hugging Face names."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model, trained in place of its weights."""

    rank: int = 0
    """Width of the adapters; 0 is off. With adapters everything else is frozen, except what
    also_train names.
    """
    alpha: int = 32
    """What adapters add is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs dropped in training."""
    targets: list[str] = field(default_factory=lambda: ["all"])
    """Adapted linears: `all`, or any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    down_proj, in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj.
    """
    also_train: list[str] = field(default_factory=list)
    """Parts that train whole beside the adapters: any of vision, projector."""

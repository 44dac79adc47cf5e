"""Sections of the configuration: the networks, their parallel layout, and adapters.

`zppo_mm.config.schema` puts them together with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zppo_mm.config.keys import key

TRAINABLE_PARTS = ("vision", "projector", "language")
"""Parts of a vision-language model that can be trained or frozen."""
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
"""Linear layers of the language model that may have adapters, by their Hugging Face names."""
TRANSFORMER_IMPLS = ("auto", "local", "transformer_engine")
PARAMS_DTYPES = ("auto", "float32", "bfloat16")
FP8_FORMATS = ("", "e4m3", "hybrid")


@dataclass(kw_only=True)
class ModelConfig:
    """The student and how its network is computed."""

    student: str = key("", "Hugging Face folder of the student. Empty: the bundled tiny student.")
    chat_template_kwargs: dict[str, Any] = key(
        {},
        "Variables of the student's chat template, such as `enable_thinking: false`. A name that "
        "the template does not read is an error.",
        may_change_on_resume="consent",
    )
    system_prompt: str = key(
        "",
        "Text of a system message in every prompt of the student, in training and evaluation, "
        "but of samples that have one of their own. Empty: what its chat template shows by itself. "
        "The teacher and the judge get none.",
        may_change_on_resume="consent",
    )
    transformer_impl: str = key(
        "auto",
        "Implementation of the transformer layers. `auto`: Transformer Engine where it is "
        "installed and a GPU is available, else `local`.",
        choices=TRANSFORMER_IMPLS,
        may_change_on_resume=True,
    )
    params_dtype: str = key(
        "auto",
        "Data type of the parameters. `auto`: bfloat16 on a GPU, float32 on a CPU.",
        choices=PARAMS_DTYPES,
    )
    fp8: str = key(
        "",
        "FP8 format of the linear layers of the language model. Empty: no FP8. Needs Transformer "
        "Engine and a GPU.",
        choices=FP8_FORMATS,
    )
    fp8_recipe: str = key(
        "tensorwise",
        "Scaling recipe of Transformer Engine for FP8.",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    recompute: str = key(
        "none",
        "Activation recomputation in the language model.",
        choices=("none", "selective", "full"),
        may_change_on_resume=True,
    )
    recompute_vision: str = key(
        "auto",
        "Activation recomputation in the blocks of the vision tower. `auto`: full if `recompute` "
        "is full.",
        choices=("auto", "none", "full"),
        may_change_on_resume=True,
    )


@dataclass(kw_only=True)
class ParallelConfig:
    """Megatron's parallel layout. The remaining ranks are data parallel."""

    tensor_model_parallel_size: int = key(
        1, "Ranks over which the weights of every layer are sharded.", at_least=1
    )
    pipeline_model_parallel_size: int = key(1, "Number of pipeline stages.", at_least=1)
    context_parallel_size: int = key(
        1,
        "Ranks over which the tokens of every packed micro-batch are sharded in training, for long "
        "responses. Each of them samples as a separate replica.",
        at_least=1,
    )
    sequence_parallel: bool = key(
        False, "Shard activations between tensor-parallel regions along the sequence."
    )
    use_distributed_optimizer: bool = key(
        True, "Shard the optimizer state over the data-parallel ranks."
    )
    overlap_grad_reduce: bool = key(False, "Overlap the gradient reduction with the backward pass.")
    offload_optimizer: bool = key(
        False,
        "Keep the optimizer state in pinned host memory, and free the gradient buffers, except "
        "during updates and while a checkpoint is copied. The GPU then has their memory for "
        "sampling.",
        may_change_on_resume=True,
    )
    timeout_minutes: float = key(
        10.0, "Time limit of collectives, after which a silent rank counts as lost.", above=0
    )
    hang_minutes: float = key(
        9.0,
        "A process whose main thread is at the same place in the program for so long hangs: all "
        "write their stacks to `stacks/` in the run's folder and end. Waits that have a limit of "
        "their own do not count. Below `timeout_minutes`, or the other ranks give up first. 0: "
        "off.",
        at_least=0,
    )


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model."""

    rank: int = key(
        0,
        "Rank of the adapters. 0: no adapters. With adapters everything else is frozen, except the "
        "parts in `also_train`.",
        at_least=0,
    )
    alpha: int = key(32, "The adapters' output is scaled by alpha / rank.", at_least=1)
    dropout: float = key(
        0.0, "Dropout probability of the adapters' inputs in training.", at_least=0, below=1
    )
    targets: list[str] = key(
        ["all"], "Linear layers with adapters.", choices=("all", *LORA_TARGETS)
    )
    also_train: list[str] = key(
        [], "Parts that are trained in full beside the adapters.", choices=("vision", "projector")
    )

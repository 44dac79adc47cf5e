"""One function builds the network, whatever megatron-core's model classes are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ConfigError, ModelError
from zppo_mm.models.adapted import is_adapted
from zppo_mm.models.families.architecture import Architecture, check_layout
from zppo_mm.models.fp8_shapes import check_fp8_shapes
from zppo_mm.models.fusions import Fusions, choose_fusions
from zppo_mm.models.specs import Implementation, block_submodules, choose_implementation
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups
from zppo_mm.parallel.gpu_packages import find_gpu_packages

_PARTS = ("vision", "projector", "language")


def build_model(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    trainable: bool = True,
) -> VisionLanguageModel:
    """Build this rank's pipeline stage, weights not yet set.

    Megatron's process groups must be initialised. `weights.load_hf_weights` or
    `initial_weights.initialize_weights` sets the weights.

    Args:
        architecture: The network.
        model: Implementation, precision and recomputation; its `student` path is not read.
        parallel: The layout that the process groups were made for.
        trainable: Whether parameters require gradients; a frozen model is also put into evaluation
            mode.

    Raises:
        ModelError: The network cannot be split into this layout.
        ConfigError: The implementation, FP8 or context parallelism is asked for where it cannot
            run, or a value is unknown.
    """
    asked = parallel
    if not trainable:
        # Sampling never shares a pack: each context rank is a replica of its own there.
        parallel = replace(parallel, context_parallel_size=1)
    check_layout(architecture, parallel)
    _check_groups(asked)
    implementation = choose_implementation(model)
    _check_context(parallel, implementation)
    check_fp8_shapes(architecture, model, parallel)
    fusions = choose_fusions(find_gpu_packages(), groups.device(), implementation, trainable)
    config = transformer_config(architecture, model, parallel, implementation, fusions)
    network = VisionLanguageModel(
        architecture,
        config,
        block_submodules(architecture, config, implementation),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        recompute_vision=recomputes_vision(model),
    )
    if not trainable:
        network.requires_grad_(False)
        network.eval()
    return network


def recomputes_vision(model: ModelConfig) -> bool:
    """Return whether the activations of the vision tower's blocks are recomputed.

    Raises:
        ConfigError: `recompute_vision` has an unknown value.
    """
    values = {"auto": model.recompute == "full", "none": False, "full": True}
    if model.recompute_vision not in values:
        raise ConfigError(
            f"model.recompute_vision: unknown value, got {model.recompute_vision!r}, expected "
            f"{', '.join(values)}; choose one of them"
        )
    return values[model.recompute_vision]


def freeze_parts(model: VisionLanguageModel, parts: list[str]) -> None:
    """Turn gradients off for parts of the network.

    Args:
        model: The network.
        parts: Any of `vision` (the tower without its merger), `projector` (the merger), `language`.

    Raises:
        ConfigError: A part is unknown, or all parts that the network has are frozen and it has no
            adapters.
    """
    for part in parts:
        if part not in _PARTS:
            raise ConfigError(
                f"train.freeze: unknown part, got {part!r}, expected any of {', '.join(_PARTS)}; "
                "correct the list"
            )
    present = _PARTS if model.architecture.has_vision else ("language",)
    if set(present) <= set(parts) and not is_adapted(model):
        raise ConfigError(
            f"train.freeze: nothing is left to train, got {sorted(parts)}, expected at least one "
            "part left out; shorten the list"
        )
    for part in parts:
        for parameter in model.parameters_of(part):
            parameter.requires_grad_(False)


def transformer_config(
    architecture: Architecture,
    model: ModelConfig,
    parallel: ParallelConfig,
    implementation: Implementation,
    fusions: Fusions,
) -> TransformerConfig:
    """Translate the network, the layout and the choice of kernels into megatron-core's
    configuration.

    Raises:
        ConfigError: `params_dtype` or `recompute` has an unknown value.
    """
    dtype = _params_dtype(model)
    options: dict[str, Any] = {
        **_network_options(architecture),
        **_recompute_options(model),
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp8": model.fp8 or None,
        "transformer_impl": implementation,
        # Packs differ in length from micro-batch to micro-batch; megatron-core asks for this
        # dispatcher then, even without experts.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,
        **fusions.options(),
    }
    if model.fp8:
        options["fp8_recipe"] = model.fp8_recipe
    return TransformerConfig(**options)


def _network_options(architecture: Architecture) -> dict[str, Any]:
    options = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.head_dim,
        "layernorm_epsilon": architecture.norm_epsilon,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": architecture.zero_centered_norm,
        "qk_layernorm": architecture.qk_norm,
        "add_qkv_bias": architecture.qkv_bias,
        "attention_output_gate": architecture.output_gate,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Checkpoints keep each layer under its own number, which layers of two kinds need.
        "hetereogenous_dist_checkpoint": True,
    }
    if architecture.has_linear_attention:
        options |= _linear_options(architecture)
    return options


def _linear_options(architecture: Architecture) -> dict[str, Any]:
    return {
        "linear_conv_kernel_dim": architecture.linear_conv_kernel_dim,
        "linear_key_head_dim": architecture.linear_key_head_dim,
        "linear_value_head_dim": architecture.linear_value_head_dim,
        "linear_num_key_heads": architecture.linear_num_key_heads,
        "linear_num_value_heads": architecture.linear_num_value_heads,
        # A list, which checkpoints of layers of two kinds ask for. megatron-core's own hybrid
        # variant stays off: it demands Transformer Engine.
        "linear_attention_freq": [
            int(kind == "linear_attention") for kind in architecture.layer_types
        ],
    }


def _recompute_options(model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "none":
        return {}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective"}
    if model.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    raise ConfigError(
        f"model.recompute: unknown value, got {model.recompute!r}, expected none, selective or "
        "full; choose one of them"
    )


def _params_dtype(model: ModelConfig) -> torch.dtype:
    types = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    }
    if model.params_dtype not in types:
        raise ConfigError(
            f"model.params_dtype: unknown value, got {model.params_dtype!r}, expected "
            f"{', '.join(types)}; choose one of them"
        )
    return types[model.params_dtype]


def _check_groups(parallel: ParallelConfig) -> None:
    if not parallel_state.is_initialized():
        raise ModelError(
            "build_model: Megatron's process groups are missing, expected an initialised layout; "
            "call parallel.initialize first"
        )
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    asked = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if sizes != asked:
        raise ModelError(
            "build_model: the layout is not that of the process groups, got tensor x pipeline x "
            f"context {asked}, expected {sizes}; pass the configuration that parallel.initialize "
            "got"
        )


def _check_context(parallel: ParallelConfig, implementation: Implementation) -> None:
    if parallel.context_parallel_size > 1 and implementation == "transformer_engine":
        raise ConfigError(
            "parallel.context_parallel_size: not with Transformer Engine's layers, got "
            f"{parallel.context_parallel_size} on a machine where it is used, expected 1 with it; "
            "set model.transformer_impl=local, or the size to 1"
        )

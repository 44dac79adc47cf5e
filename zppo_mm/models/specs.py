"""Which module each part of a layer is built from: megatron-core's own layers, or Transformer
Engine's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from zppo_mm.config.schema import ModelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.families.architecture import Architecture, LayerType
from zppo_mm.models.layers.attention import PackedAttention, PackedSelfAttention
from zppo_mm.models.layers.deepstack import DeepstackLayer
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from zppo_mm.models.layers.norm import RMSNorm
from zppo_mm.parallel.megatron_versions import mlp_specification

Implementation = Literal["local", "transformer_engine"]
RECIPE_CAPABILITIES = {
    "delayed": (8, 9),
    "tensorwise": (8, 9),
    "blockwise": (9, 0),
    "mxfp8": (10, 0),
}
"""CUDA compute capability from which on Transformer Engine has a recipe: Ada, Hopper, Blackwell."""


def transformer_engine_provider() -> BackendSpecProvider | None:
    """Return megatron-core's catalogue of Transformer Engine modules, `None` where the package is
    not usable.
    """
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    except Exception:
        # The meta package without its torch part raises RuntimeError, a CUDA mismatch raises
        # OSError.
        return None
    return TESpecProvider() if HAVE_TE else None


def choose_implementation(model: ModelConfig) -> Implementation:
    """Decide what layers are built from, and refuse what this machine cannot do.

    Raises:
        ConfigError: Transformer Engine or FP8 is asked for without a GPU or without the package, or
            a value is unknown.
    """
    asked = model.transformer_impl
    if asked not in ("auto", "local", "transformer_engine"):
        raise ConfigError(
            f"model.transformer_impl: unknown value, got {asked!r}, expected auto, local or "
            "transformer_engine; choose one of them"
        )
    missing = _missing_for_transformer_engine()
    for key, wanted in (
        ("model.transformer_impl=transformer_engine", asked == "transformer_engine"),
        (f"model.fp8={model.fp8}", bool(model.fp8)),
    ):
        if wanted and missing:
            raise ConfigError(
                f"{key}: Transformer Engine cannot be used here, got {missing}, expected a CUDA "
                "GPU and the package transformer-engine[pytorch]; install the extra `gpu` on a "
                "machine with a GPU, or leave the key at its default"
            )
    if model.fp8:
        check_recipe(model, torch.cuda.get_device_capability())
    if model.fp8 and asked == "local":
        raise ConfigError(
            "model.fp8: needs Transformer Engine's layers, got model.transformer_impl=local, "
            "expected auto or transformer_engine; change one of them"
        )
    return "local" if asked == "local" or missing else "transformer_engine"


def check_recipe(model: ModelConfig, capability: tuple[int, int]) -> None:
    """Refuse an FP8 recipe that the GPU cannot compute.

    Args:
        model: Names the recipe.
        capability: CUDA compute capability of the GPU.

    Raises:
        ConfigError: The GPU is older than the recipe.
    """
    needed = RECIPE_CAPABILITIES[model.fp8_recipe]
    if capability < needed:
        got, expected = (".".join(map(str, version)) for version in (capability, needed))
        usable = [name for name, version in RECIPE_CAPABILITIES.items() if version <= capability]
        raise ConfigError(
            f"model.fp8_recipe={model.fp8_recipe}: this GPU cannot compute it, got compute "
            f"capability {got}, expected {expected} or newer; "
            + (f"choose {' or '.join(usable)}" if usable else "leave model.fp8 empty")
        )


def _missing_for_transformer_engine() -> str:
    """Return what this machine lacks, empty if nothing."""
    if not torch.cuda.is_available():
        return "no GPU"
    return (
        "" if transformer_engine_provider() is not None else "no usable installation of the package"
    )


def block_submodules(
    architecture: Architecture, config: TransformerConfig, implementation: Implementation
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage."""
    make = (
        _local_layer
        if implementation == "local"
        else partial(_transformer_engine_layer, fp8=bool(config.fp8))
    )
    offset, count = get_transformer_layer_offset(config), get_num_layers_to_build(config)
    layers = [
        make(kind, architecture) for kind in architecture.layer_types[offset : offset + count]
    ]
    if implementation == "local":
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    provider = transformer_engine_provider()
    assert provider is not None
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=provider.layer_norm(rms_norm=True)
    )


def _local_layer(kind: LayerType, architecture: Architecture) -> ModuleSpec:
    norms = {"input_layernorm": RMSNorm, "pre_mlp_layernorm": RMSNorm}
    if kind == "linear_attention":
        mixer, projection = _delta_net(ColumnParallelLinear, RowParallelLinear), "in_proj"
    else:
        norm = RMSNorm if architecture.qk_norm else None
        mixer, projection = (
            _attention(ColumnParallelLinear, RowParallelLinear, norm),
            "linear_qkv",
        )
    # Checkpoints carry Transformer Engine's names, which hold a norm inside the linear layer after
    # it.
    names = {
        "input_layernorm.": f"self_attention.{projection}.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return _layer(
        architecture,
        mixer,
        ColumnParallelLinear,
        RowParallelLinear,
        sharded_state_dict_keys_map=names,
        **norms,
    )


def _transformer_engine_layer(kind: LayerType, architecture: Architecture, fp8: bool) -> ModuleSpec:
    provider = transformer_engine_provider()
    assert provider is not None
    column, row = provider.column_parallel_layer_norm_linear(), provider.row_parallel_linear()
    norms: dict[str, Any] = {"input_layernorm": IdentityOp, "pre_mlp_layernorm": IdentityOp}
    if kind == "linear_attention":
        mixer = _delta_net(column, row)
        if fp8:
            # The layer computes two small projections of the normalised input by itself, so the
            # norm must stand alone.
            mixer = _delta_net(provider.column_parallel_linear(), row)
            norms["input_layernorm"] = provider.layer_norm(rms_norm=True)
            norms["sharded_state_dict_keys_map"] = {
                "input_layernorm.": "self_attention.in_proj.layer_norm_"
            }
    else:
        norm = provider.layer_norm(rms_norm=True, for_qk=True) if architecture.qk_norm else None
        mixer = _attention(column, row, norm)
    return _layer(architecture, mixer, column, row, **norms)


def _delta_net(column: Any, row: Any) -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet, submodules=GatedDeltaNetSubmodules(in_proj=column, out_proj=row)
    )


def _attention(column: Any, row: Any, norm: Any) -> ModuleSpec:
    # Torch's attention with Transformer Engine's layers too: only ours lets prompts be shared.
    submodules = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=PackedAttention,
        linear_proj=row,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=submodules,
    )


def _layer(
    architecture: Architecture, mixer: ModuleSpec, column: Any, row: Any, **others: Any
) -> ModuleSpec:
    return ModuleSpec(
        module=DeepstackLayer if architecture.num_deepstack else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            mlp=mlp_specification(column, row, architecture.ffn_hidden_size),
            mlp_bda=get_bias_dropout_add,
            **others,
        ),
    )

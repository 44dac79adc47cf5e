"""Hugging Face weights into the network: which tensors make which parameter, and how each is cut
over ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import Architecture, LayerType
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

COPIED_KEYS = re.compile(r"mtp\.|.*\brotary_emb\.inv_freq$")
"""Keys that are not part of the network and copied from the source on export: the
multi-token-prediction head, and the frequencies that old files keep although config.json decides
them.
"""
OUTPUT_LAYER = "lm_head.weight"
ADAPTERS = "lora."
"""How the names of adapters begin, which Hugging Face folders do not hold."""
_VISION_PARAMETERS = "vision.model."
_LANGUAGE_PARAMETERS = "language_model."
Fusion = Literal["single", "concatenated", "qkv"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one kind of parameter is made from Hugging Face tensors.

    Attributes:
        names: The parameter's name inside its layer, local spelling first, then Transformer
            Engine's.
        sources: Hugging Face names inside the layer.
        fusion: How several tensors become one.
        axis: Axis cut over tensor-parallel ranks; `None` for a replicated parameter.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    fusion: Fusion = "single"
    axis: int | None = None


_LAYER_RULES = (
    Rule(
        (
            "input_layernorm.weight",
            "self_attention.linear_qkv.layer_norm_weight",
            "self_attention.in_proj.layer_norm_weight",
        ),
        ("input_layernorm.weight",),
    ),
    Rule(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("post_attention_layernorm.weight",),
    ),
    Rule(
        ("self_attention.linear_qkv.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
        0,
    ),
    Rule(
        ("self_attention.linear_qkv.bias",),
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
        0,
    ),
    Rule(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), axis=1),
    Rule(("self_attention.q_layernorm.weight",), ("self_attn.q_norm.weight",)),
    Rule(("self_attention.k_layernorm.weight",), ("self_attn.k_norm.weight",)),
    Rule(
        ("self_attention.in_proj.weight",),
        tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")),
        "concatenated",
        0,
    ),
    Rule(("self_attention.conv1d.weight",), ("linear_attn.conv1d.weight",), axis=0),
    Rule(("self_attention.A_log",), ("linear_attn.A_log",), axis=0),
    Rule(("self_attention.dt_bias",), ("linear_attn.dt_bias",), axis=0),
    Rule(("self_attention.out_norm.weight",), ("linear_attn.norm.weight",)),
    Rule(("self_attention.out_proj.weight",), ("linear_attn.out_proj.weight",), axis=1),
    Rule(
        ("mlp.linear_fc1.weight",),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "concatenated",
        0,
    ),
    Rule(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), axis=1),
)
_TOP_RULES = {
    "embedding.word_embeddings.weight": ("embed_tokens.weight", 0),
    "decoder.final_layernorm.weight": ("norm.weight", None),
}


@dataclass(frozen=True, slots=True)
class Mapping:
    """One parameter of this rank and the Hugging Face tensors that it is made from.

    Attributes:
        name: The parameter's name on this rank.
        parameter: This rank's shard.
        keys: Full Hugging Face keys.
        rule: How they become the parameter.
        copied_from_embedding: Whether it is the last stage's copy of a tied embedding, which no
            file holds under its own name.
    """

    name: str
    parameter: nn.Parameter
    keys: tuple[str, ...]
    rule: Rule
    copied_from_embedding: bool = False

    @property
    def short_name(self) -> str:
        return self.rule.names[0]


def parameter_mappings(model: VisionLanguageModel) -> Iterator[Mapping]:
    """Yield every parameter of this rank's stage with its Hugging Face keys; adapters, which have
    none, are left out.
    """
    architecture = model.architecture
    language, vision = architecture.language_prefix, architecture.vision_prefix
    offset = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        if name.startswith(ADAPTERS):
            continue
        if name.startswith(_VISION_PARAMETERS):
            key = vision + name.removeprefix(_VISION_PARAMETERS)
            yield Mapping(name, parameter, (key,), Rule((name,), (key,)))
            continue
        inner = name.removeprefix(_LANGUAGE_PARAMETERS)
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", inner)
        if layer is not None:
            rule = _layer_rule(layer[2])
            prefix = f"{language}layers.{int(layer[1]) + offset}."
            yield Mapping(name, parameter, tuple(prefix + source for source in rule.sources), rule)
        elif inner == "output_layer.weight":
            tied = architecture.tie_word_embeddings
            key = embedding_key(architecture) if tied else OUTPUT_LAYER
            yield Mapping(
                name, parameter, (key,), Rule((inner,), (key,), axis=0), copied_from_embedding=tied
            )
        else:
            source, axis = _TOP_RULES[inner]
            yield Mapping(
                name, parameter, (language + source,), Rule((inner,), (source,), axis=axis)
            )


def _layer_rule(name: str) -> Rule:
    for rule in _LAYER_RULES:
        if name in rule.names:
            return rule
    raise AssertionError(f"no weight rule for the parameter {name}")


@torch.no_grad()
def load_hf_weights(model: VisionLanguageModel, hf_dir: str | Path) -> None:
    """Set every parameter of this rank from a Hugging Face folder, one tensor in memory at a time.

    Raises:
        ModelError: A file or key is missing, a key is not known, or a shape does not fit; the
            message names file and key.
    """
    folder = SafetensorsFolder(hf_dir)
    check_keys(model, folder)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for mapping in parameter_mappings(model):
        _check_shapes(mapping, folder, model.architecture, size)
        tensors = [folder.read(key) for key in mapping.keys]
        whole = fuse_tensors(tensors, mapping.rule, model.architecture)
        mapping.parameter.copy_(cut(whole, mapping, model.architecture, rank, size))


def embedding_key(architecture: Architecture) -> str:
    """Return the Hugging Face key of the embedding."""
    return f"{architecture.language_prefix}embed_tokens.weight"


def tied_copies(architecture: Architecture, folder: SafetensorsFolder) -> dict[str, str]:
    """Return by the key of the embedding that of its copy, the output layer, if a folder has both
    for one tied parameter.
    """
    both = architecture.tie_word_embeddings and OUTPUT_LAYER in folder.weight_map
    return {embedding_key(architecture): OUTPUT_LAYER} if both else {}


def known_language_keys(architecture: Architecture) -> set[str]:
    """Return all Hugging Face keys of the language model, on whichever stage they are."""
    prefix = architecture.language_prefix
    keys = {prefix + source for source, _axis in _TOP_RULES.values()}
    if not architecture.tie_word_embeddings:
        keys.add(OUTPUT_LAYER)
    for number, kind in enumerate(architecture.layer_types):
        absent = _absent_sources(architecture, kind)
        sources = (source for rule in _LAYER_RULES for source in rule.sources)
        keys.update(
            f"{prefix}layers.{number}.{source}"
            for source in sources
            if not source.startswith(absent)
        )
    return keys


def _absent_sources(architecture: Architecture, kind: LayerType) -> tuple[str, ...]:
    """Return how the names of tensors begin that a layer of this kind does not have."""
    if kind == "linear_attention":
        return ("self_attn.",)
    absent = ["linear_attn."]
    if not architecture.qk_norm:
        absent += ["self_attn.q_norm.", "self_attn.k_norm."]
    if not architecture.qkv_bias:
        absent += [f"self_attn.{part}_proj.bias" for part in "qkv"]
    return tuple(absent)


def check_keys(model: VisionLanguageModel, folder: SafetensorsFolder) -> None:
    """Check that a folder has every tensor of the network and nothing that belongs to none; the
    tower's on its stage alone.

    Raises:
        ModelError: A key is missing or not known, or the output layer is not the embedding although
            config.json says so.
    """
    architecture = model.architecture
    known = known_language_keys(architecture) | {
        key for mapping in parameter_mappings(model) for key in mapping.keys
    }
    present = set(folder.weight_map)
    missing = sorted(known - present)
    if missing:
        raise ModelError(
            f"{folder.where(missing[0])}: the key {missing[0]} is missing ({len(missing)} in all), "
            f"got {len(present)} keys, expected all of the network that config.json describes; "
            "download or export the folder again"
        )
    copies = tied_copies(architecture, folder)
    elsewhere = tuple(
        filter(
            None,
            (
                architecture.foreign_prefix,
                architecture.vision_prefix if model.vision is None else "",
            ),
        )
    )
    unknown = sorted(
        key
        for key in present - known - set(copies.values())
        if not COPIED_KEYS.match(key) and not key.startswith(elsewhere)
    )
    if unknown:
        raise ModelError(
            f"{folder.where(unknown[0])}: the key {unknown[0]} belongs to nothing in the network "
            f"({len(unknown)} in all), expected only keys of the network that config.json "
            "describes and mtp.*; check that config.json and weights are of the same model"
        )
    for key, copy in copies.items():
        if not folder.have_equal_values(key, copy):
            raise ModelError(
                f"{folder.where(copy)}: {copy} is not the embedding, got other values than those "
                f"of {key}, expected the same because tie_word_embeddings is true in config.json; "
                "set it to false there if the output layer was trained by itself"
            )


def _check_shapes(
    mapping: Mapping, folder: SafetensorsFolder, architecture: Architecture, size: int
) -> None:
    full = list(mapping.parameter.shape)
    if mapping.rule.axis is not None:
        full[mapping.rule.axis] *= size
    expected = split_tensors(torch.empty(full, device="meta"), mapping.rule, architecture)
    for key, tensor in zip(mapping.keys, expected, strict=True):
        shape = folder.shape(key)
        if shape != tuple(tensor.shape):
            raise ModelError(
                f"{folder.where(key)}: the shape of {key} does not fit, got {list(shape)}, "
                f"expected {list(tensor.shape)} from config.json; check that config.json and "
                "weights are of the same model"
            )


def fuse_tensors(
    tensors: list[torch.Tensor], rule: Rule, architecture: Architecture
) -> torch.Tensor:
    """Make one parameter, not yet cut, from its Hugging Face tensors."""
    if rule.fusion == "single":
        return tensors[0]
    if rule.fusion == "concatenated":
        return torch.cat(tensors)
    groups, dim, heads, parts = _attention_sizes(architecture)
    query, key, value = tensors
    # Hugging Face interleaves query and gate per head; megatron-core takes all queries, then all
    # gates, key and value of a group.
    query = (
        query.reshape(groups, heads, parts, dim, -1)
        .transpose(1, 2)
        .reshape(groups, parts * heads * dim, -1)
    )
    whole = torch.cat([query, key.reshape(groups, dim, -1), value.reshape(groups, dim, -1)], 1)
    return whole.reshape(-1, *tensors[0].shape[1:])


def split_tensors(
    whole: torch.Tensor, rule: Rule, architecture: Architecture
) -> list[torch.Tensor]:
    """Undo `fuse_tensors`."""
    if rule.fusion == "single":
        return [whole]
    if rule.fusion == "concatenated":
        return list(torch.split(whole, _concatenated_sizes(rule, architecture)))
    groups, dim, heads, parts = _attention_sizes(architecture)
    rest = whole.shape[1:]
    query, key, value = torch.split(
        whole.reshape(groups, -1, *rest), [parts * heads * dim, dim, dim], 1
    )
    query = query.reshape(groups, parts, heads, dim, *rest).transpose(1, 2)
    return [query.reshape(-1, *rest), key.reshape(-1, *rest), value.reshape(-1, *rest)]


def cut(
    whole: torch.Tensor, mapping: Mapping, architecture: Architecture, rank: int, size: int
) -> torch.Tensor:
    """Return a rank's shard of a parameter: its part of each section, concatenated."""
    axis = mapping.rule.axis
    if axis is None or size == 1:
        return whole
    sections = _sections(mapping, architecture, whole.shape[axis])
    return torch.cat(
        [section.chunk(size, axis)[rank] for section in torch.split(whole, sections, axis)], axis
    )


def join(shards: list[torch.Tensor], mapping: Mapping, architecture: Architecture) -> torch.Tensor:
    """Undo `cut`, given the shards of all ranks in order."""
    axis = mapping.rule.axis
    if axis is None or len(shards) == 1:
        return shards[0]
    size = len(shards)
    sections = [
        section // size
        for section in _sections(mapping, architecture, shards[0].shape[axis] * size)
    ]
    parts = [torch.split(shard, sections, axis) for shard in shards]
    return torch.cat([part[section] for section in range(len(sections)) for part in parts], axis)


def _sections(mapping: Mapping, architecture: Architecture, whole: int) -> list[int]:
    """Return the sections of a parameter that are cut one by one."""
    key, value, heads = _linear_sizes(architecture)
    if mapping.short_name == "self_attention.in_proj.weight":
        return [key, key, value, value, heads, heads]
    if mapping.short_name == "self_attention.conv1d.weight":
        return [key, key, value]
    if mapping.short_name == "mlp.linear_fc1.weight":
        return [whole // 2, whole // 2]
    return [whole]


def _concatenated_sizes(rule: Rule, architecture: Architecture) -> list[int]:
    key, value, heads = _linear_sizes(architecture)
    if rule.names[0] == "mlp.linear_fc1.weight":
        return [architecture.ffn_hidden_size] * 2
    return [2 * key + value, value, heads, heads]


def _attention_sizes(architecture: Architecture) -> tuple[int, int, int, int]:
    """Return KV heads, width of a head, query heads per KV head, and what a query head is made
    of: itself, or itself and its gate.
    """
    groups = architecture.num_query_groups
    return (
        groups,
        architecture.head_dim,
        architecture.num_attention_heads // groups,
        1 + architecture.output_gate,
    )


def _linear_sizes(architecture: Architecture) -> tuple[int, int, int]:
    """Return the widths of all keys and all values of a DeltaNet layer, and its value heads."""
    key = architecture.linear_num_key_heads * architecture.linear_key_head_dim
    value = architecture.linear_num_value_heads * architecture.linear_value_head_dim
    return key, value, architecture.linear_num_value_heads

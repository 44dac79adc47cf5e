"""What a Hugging Face folder says about its network: everything is read from config.json, nothing from a table of sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zppo_mm.config import ParallelConfig
from zppo_mm.errors import ModelError

LayerType = Literal["linear_attention", "full_attention"]
_FAMILIES = ("qwen3_5", "qwen3_5_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network, as config.json describes it.

    Attributes:
        family: `qwen3_5` (with a vision tower) or `qwen3_5_text`.
        hidden_size: Width of the residual stream.
        layer_types: Kind of attention of every layer.
        head_dim: Width of a head of full attention.
        rotary_dim: How many of its channels are rotated.
        mrope_section: Rotary frequencies of the time, height and width axes; they interleave.
        tie_word_embeddings: Whether the output layer is the embedding.
        image_token_id: Placeholder of image features; -1 in a text-only network, as are the next three.
        raw: The whole config.json.
        text: The text part of it.
        vision: The `vision_config` part, `None` in a text-only network.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    rotary_dim: int
    rotary_base: float
    mrope_section: tuple[int, int, int]
    norm_epsilon: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    spatial_merge_size: int
    raw: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any] | None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def has_vision(self) -> bool:
        return self.vision is not None


def load_architecture(hf_dir: str | Path) -> Architecture:
    """Read `config.json` of a Hugging Face folder.

    Raises:
        ModelError: The file is missing or no JSON, the family is not supported, or a setting is not.
    """
    path = Path(hf_dir) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: the file is missing, expected a Hugging Face model folder; check the path") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON, got {error}; download or export the folder again") from error
    return parse_architecture(raw, str(path))


def parse_architecture(raw: dict[str, Any], where: str = "config.json") -> Architecture:
    """Check a parsed config.json and name what the network needs.

    Args:
        raw: The parsed file.
        where: Its name in error messages.

    Raises:
        ModelError: The family is not supported, a key is missing, or a setting is not supported.
    """
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise ModelError(
            f"{where}: model_type is not supported, got {family!r}, expected one of {', '.join(_FAMILIES)}; use a Qwen3.5 folder"
        )
    text = raw.get("text_config", raw)
    vision = raw.get("vision_config") if family == "qwen3_5" else None
    try:
        architecture = _parse(family, raw, text, vision)
    except KeyError as error:
        raise ModelError(f"{where}: the key {error} is missing, expected a complete {family} config; download the folder again") from error
    _check_settings(architecture, where)
    return architecture


def _parse(family: str, raw: dict[str, Any], text: dict[str, Any], vision: dict[str, Any] | None) -> Architecture:
    rope = text["rope_parameters"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0)))
    section = rope.get("mrope_section", [rotary_dim // 2, 0, 0])
    return Architecture(
        family=family,
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        layer_types=_layer_types(text),
        num_attention_heads=text["num_attention_heads"],
        num_query_groups=text["num_key_value_heads"],
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rotary_base=float(rope["rope_theta"]),
        mrope_section=(section[0], section[1], section[2]),
        norm_epsilon=text["rms_norm_eps"],
        linear_num_key_heads=text["linear_num_key_heads"],
        linear_num_value_heads=text["linear_num_value_heads"],
        linear_key_head_dim=text["linear_key_head_dim"],
        linear_value_head_dim=text["linear_value_head_dim"],
        linear_conv_kernel_dim=text["linear_conv_kernel_dim"],
        max_position_embeddings=text["max_position_embeddings"],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        image_token_id=raw["image_token_id"] if vision else -1,
        video_token_id=raw["video_token_id"] if vision else -1,
        vision_start_token_id=raw["vision_start_token_id"] if vision else -1,
        vision_end_token_id=raw["vision_end_token_id"] if vision else -1,
        spatial_merge_size=vision["spatial_merge_size"] if vision else 1,
        raw=raw,
        text=text,
        vision=vision,
    )


def _layer_types(text: dict[str, Any]) -> tuple[LayerType, ...]:
    if text.get("layer_types"):
        return tuple(text["layer_types"])
    interval = text.get("full_attention_interval", 4)
    return tuple("linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(text["num_hidden_layers"]))


def _check_settings(architecture: Architecture, where: str) -> None:
    """Refuse what the network would silently compute differently."""
    text, vision = architecture.text, architecture.vision or {}
    rope = text["rope_parameters"]
    found = {
        "hidden_act": (text.get("hidden_act", "silu"), ("silu",)),
        "attention_bias": (bool(text.get("attention_bias", False)), (False,)),
        "attn_output_gate": (text.get("attn_output_gate", True), (True,)),
        "output_gate_type": (text.get("output_gate_type") or "swish", ("swish", "silu")),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), ("default",)),
        "rope_parameters.mrope_interleaved": (rope.get("mrope_interleaved", True), (True,)),
        "vision_config.deepstack_visual_indexes": (len(vision.get("deepstack_visual_indexes") or ()), (0,)),
        "layer_types": (len(architecture.layer_types), (text["num_hidden_layers"],)),
    }
    for key, (value, allowed) in found.items():
        if value not in allowed:
            raise ModelError(
                f"{where}: {key} is not supported, got {value!r}, expected {' or '.join(map(repr, allowed))}; "
                "use an unmodified Qwen3.5 folder"
            )
    unknown = set(architecture.layer_types) - {"linear_attention", "full_attention"}
    if unknown:
        raise ModelError(
            f"{where}: layer_types has an unknown kind, got {sorted(unknown)}, expected linear_attention or full_attention; use "
            "an unmodified Qwen3.5 folder"
        )
    if sum(architecture.mrope_section) * 2 != architecture.rotary_dim:
        raise ModelError(
            f"{where}: mrope_section does not fit, got {list(architecture.mrope_section)}, expected a sum of "
            f"{architecture.rotary_dim // 2} (half the rotated channels of a head); correct rope_parameters"
        )


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Check that the network can be split over the tensor and pipeline ranks.

    Raises:
        ModelError: Heads, feed-forward width or vocabulary do not divide by the tensor size, or layers by the pipeline size.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    by_tensor = {
        "num_key_value_heads": architecture.num_query_groups,
        "num_attention_heads": architecture.num_attention_heads,
        "linear_num_key_heads": architecture.linear_num_key_heads,
        "linear_num_value_heads": architecture.linear_num_value_heads,
        "intermediate_size": architecture.ffn_hidden_size,
        "vocab_size": architecture.vocab_size,
    }
    for name, value in by_tensor.items():
        if value % tensor:
            raise ModelError(
                f"parallel.tensor_model_parallel_size: {name} cannot be split, got {value} over {tensor} ranks, expected a "
                f"multiple of {tensor}; choose a tensor size that divides it"
            )
    if architecture.num_layers % pipeline:
        raise ModelError(
            f"parallel.pipeline_model_parallel_size: layers cannot be split, got {architecture.num_layers} over {pipeline} stages, "
            f"expected a multiple of {pipeline}; choose a pipeline size that divides them"
        )

"""What every family's config.json is turned into, and the reading that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from encoders.config import TIMESTAMPED, VideoLayout
from zppo_mm.errors import ModelError

LayerType = Literal["linear_attention", "full_attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network, as config.json describes it. Nothing after this asks which family it is.

    Attributes:
        family: `model_type` of config.json.
        title: The family's name in messages.
        language_prefix: What stands before the language model's names in the weight files.
        vision_prefix: The same for the vision tower; empty in a text-only network.
        hidden_size: Width of the residual stream.
        layer_types: Kind of attention of every layer.
        head_dim: Width of a head of full attention.
        qk_norm: Whether queries and keys are normalised per head.
        qkv_bias: Whether query, key and value projections have a bias.
        output_gate: Whether the output of full attention is gated; the gate comes out of the query projection.
        zero_centered_norm: Whether norms store their weight minus one.
        rotary_dim: How many channels of a head are rotated.
        rotary_scaling: Settings of a `rope_type` other than `default`; empty for that one.
        mrope_section: Rotary frequencies of the time, height and width axes.
        mrope_interleaved: Whether the axes' frequencies alternate; otherwise each axis has one block.
        linear_num_key_heads: Of DeltaNet layers; 0, like the next four, in a network without.
        tie_word_embeddings: Whether the output layer is the embedding.
        image_token_id: Placeholder of image features; -1 in a text-only network, as are the next three.
        num_deepstack: How many first layers get further features of the media added to their output.
        video_layout: How videos are shown in the prompt.
        raw: The whole config.json.
        text: The text part of it.
        vision: The `vision_config` part, `None` in a text-only network.
    """

    family: str
    title: str
    language_prefix: str
    vision_prefix: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    qk_norm: bool
    qkv_bias: bool
    output_gate: bool
    zero_centered_norm: bool
    rotary_dim: int
    rotary_base: float
    rotary_scaling: Mapping[str, Any]
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    norm_epsilon: float
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    max_position_embeddings: int
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    spatial_merge_size: int
    num_deepstack: int = 0
    video_layout: VideoLayout = TIMESTAMPED
    raw: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any] | None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def has_vision(self) -> bool:
        return self.vision is not None

    @property
    def has_linear_attention(self) -> bool:
        return "linear_attention" in self.layer_types


def timestamped_videos(raw: Mapping[str, Any]) -> VideoLayout:
    """Return the layout of families that write the time before every temporal patch, whatever config.json says."""
    return TIMESTAMPED


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family reads.

    Attributes:
        title: Its name in messages.
        read: Makes the architecture from the whole config.json; raises KeyError for a key that is missing. The second argument names
            the file in messages.
        video_layout: Makes the layout of videos from the whole config.json; raises KeyError for a key that is missing. Prompts are made
            without the architecture.
    """

    title: str
    read: Callable[[dict[str, Any], str], Architecture]
    video_layout: Callable[[Mapping[str, Any]], VideoLayout] = timestamped_videos


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's settings: an object of their own, or the whole file."""
    part: dict[str, Any] = raw.get("text_config") or raw
    return part


def rope_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings under the names of transformers 5: `rope_theta`, `rope_type` and what belongs to that type.

    Folders written before have `rope_theta` beside `rope_scaling`, whose type was once called `type`.
    """
    if text.get("rope_parameters"):
        return dict(text["rope_parameters"])
    settings = dict(text.get("rope_scaling") or {})
    settings.setdefault("rope_type", settings.pop("type", "default"))
    settings["rope_theta"] = text["rope_theta"]
    return settings


def common_fields(raw: dict[str, Any], text: dict[str, Any], vision: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields of the architecture that every family spells alike."""
    rope = rope_settings(text)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0)))
    section = rope.get("mrope_section") or [rotary_dim // 2, 0, 0]
    media_tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "family": raw["model_type"],
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "ffn_hidden_size": text["intermediate_size"],
        "layer_types": tuple(text.get("layer_types") or ["full_attention"] * text["num_hidden_layers"]),
        "num_attention_heads": text["num_attention_heads"],
        "num_query_groups": text.get("num_key_value_heads") or text["num_attention_heads"],
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "rotary_base": float(rope["rope_theta"]),
        "rotary_scaling": {},
        "mrope_section": (section[0], section[1], section[2]),
        "mrope_interleaved": True,
        "norm_epsilon": text["rms_norm_eps"],
        "max_position_embeddings": text["max_position_embeddings"],
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        **{name: raw[name] if vision else -1 for name in media_tokens},
        "spatial_merge_size": vision["spatial_merge_size"] if vision else 1,
        "raw": raw,
        "text": text,
        "vision": vision,
    }


def refuse_others(where: str, title: str, found: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Refuse what the network would silently compute differently.

    Args:
        where: The file in messages.
        title: The family's name.
        found: Per setting, its value and the values that are supported.

    Raises:
        ModelError: A setting has another value.
    """
    for key, (value, allowed) in found.items():
        if value not in allowed:
            raise ModelError(
                f"{where}: {key} is not supported, got {value!r}, expected {' or '.join(map(repr, allowed))}; "
                f"use an unmodified {title} folder"
            )


def check_architecture(architecture: Architecture, where: str) -> None:
    """Check what must hold in every family.

    Raises:
        ModelError: A kind of layer is unknown, there are too few or too many of them, or rotary frequencies do not add up.
    """
    text = architecture.text
    refuse_others(where, architecture.title, {"layer_types": (len(architecture.layer_types), (text["num_hidden_layers"],))})
    kinds = ["full_attention", "linear_attention"] if architecture.linear_num_key_heads else ["full_attention"]
    unknown = set(architecture.layer_types) - set(kinds)
    if unknown:
        raise ModelError(
            f"{where}: layer_types has an unknown kind, got {sorted(unknown)}, expected {' or '.join(reversed(kinds))}; use "
            f"an unmodified {architecture.title} folder"
        )
    if sum(architecture.mrope_section) * 2 != architecture.rotary_dim:
        raise ModelError(
            f"{where}: mrope_section does not fit, got {list(architecture.mrope_section)}, expected a sum of "
            f"{architecture.rotary_dim // 2} (half the rotated channels of a head); correct rope_parameters"
        )

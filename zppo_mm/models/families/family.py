"""What every family's config.json is turned into, and the reading that families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers.activations import ACT2FN

from encoders.config import TIMESTAMPED, VideoLayout
from zppo_mm.errors import ModelError
from zppo_mm.models.families.config_keys import TOWER_SIZES
from zppo_mm.models.families.key_names import TEXT, Renames
from zppo_mm.models.families.rope import read_rotary
from zppo_mm.models.families.settings import Settings, check_size, media_tokens, refusal

LayerType = Literal["linear_attention", "full_attention"]
Section = tuple[int, int, int]
"""Rotary frequencies of the time, height and width axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network, as config.json describes it. Nothing after this asks which family it is.

    Attributes:
        family: `model_type` of config.json.
        title: The family's name in messages.
        language_prefix: What comes before the language model's names in transformers' model.
        vision_prefix: The same for the vision tower; empty in a text-only network.
        hidden_size: Width of the residual stream.
        layer_types: Kind of attention of every layer.
        head_dim: Width of a head of full attention.
        qk_norm: Whether queries and keys are normalised per head.
        qkv_bias: Whether query, key and value projections have a bias.
        output_gate: Whether the output of full attention is gated; the gate comes out of the query
            projection.
        zero_centered_norm: Whether norms store their weight minus one.
        rotary_dim: How many channels of a head are rotated.
        rotary_frequencies: Radians per position, one for each pair of rotated channels.
        rotary_amplitude: Factor of sines and cosines.
        mrope_section: Rotary frequencies of the time, height and width axes.
        mrope_interleaved: Whether the axes' frequencies alternate; otherwise each axis has one
            block.
        linear_num_key_heads: Of DeltaNet layers; 0, like the next four, in a network without.
        foreign_prefix: How keys of a tower begin that a text-only network leaves alone; empty if
            there are none.
        tie_word_embeddings: Whether the output layer is the embedding.
        image_token_id: Placeholder of image features; -1 in a text-only network, as are the next
            three.
        num_deepstack: How many first layers get further features of the media added to their
            output.
        video_layout: How videos are shown in the prompt.
        vision: The `vision_config` part of config.json, `None` in a text-only network.
    """

    family: str
    title: str
    language_prefix: str
    vision_prefix: str = ""
    foreign_prefix: str = ""
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    qk_norm: bool = False
    qkv_bias: bool = False
    output_gate: bool = False
    zero_centered_norm: bool = False
    rotary_dim: int
    rotary_frequencies: tuple[float, ...]
    rotary_amplitude: float
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
    """Return the layout of families that write the time before every temporal patch, whatever
    config.json says.
    """
    return TIMESTAMPED


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family reads.

    Attributes:
        title: Its name in messages.
        read: Makes the architecture from the settings that transformers reads in config.json.
        video_layout: Makes the layout of videos from the whole config.json; raises KeyError for a
            key that is missing. Prompts are made without the architecture.
        key_names: Spellings of keys in weight files.
    """

    title: str
    read: Callable[[Settings], Architecture]
    video_layout: Callable[[Mapping[str, Any]], VideoLayout] = timestamped_videos
    key_names: Renames = TEXT


def common_fields(
    settings: Settings, *, partial_rotation: bool = False, mrope_section: Section = (0, 0, 0)
) -> dict[str, Any]:
    """Return the fields of the architecture that every family spells alike.

    Args:
        settings: Of the file.
        partial_rotation: Whether the family may rotate some channels of a head alone.
        mrope_section: What transformers takes where the file does not say it.

    Raises:
        ModelError: A setting is not supported.
    """
    text, vision, head_dim = settings.text, settings.vision, settings.head_dim
    fraction = text.rope_parameters.get("partial_rotary_factor")
    if fraction not in (None, 1) and not partial_rotation:
        raise refusal(settings, "partial_rotary_factor", fraction, (1.0,))
    if fraction is not None and (type(fraction) not in (int, float) or not 0 < fraction <= 1):
        raise refusal(settings, "partial_rotary_factor", fraction, ("a number above 0, at most 1",))
    rotary_dim = int(head_dim * (1 if fraction is None else fraction))
    rotary = read_rotary(text, rotary_dim, settings.where)
    # Text has the same position on all axes.
    section = (
        (text.rope_parameters.get("mrope_section") or mrope_section)
        if vision is not None
        else (rotary_dim // 2, 0, 0)
    )
    if not isinstance(section, list | tuple) or any(
        type(axis) is not int or axis < 0 for axis in section
    ):
        raise refusal(settings, "mrope_section", section, ("three whole numbers",))
    return {
        "title": settings.title,
        "family": settings.outer.model_type,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "layer_types": tuple(
            getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        ),
        "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "rotary_frequencies": rotary.frequencies,
        "rotary_amplitude": rotary.amplitude,
        "mrope_section": tuple(section),
        "mrope_interleaved": True,
        "norm_epsilon": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": _is_tied(settings),
        **media_tokens(settings),
        "spatial_merge_size": vision.spatial_merge_size if vision is not None else 1,
        "vision": settings.raw["vision_config"] if vision is not None else None,
    }


def refuse_other_axes(settings: Settings, *, interleaved: bool) -> None:
    """Refuse rotary axes that are laid out in another way than the family's, which transformers
    takes for granted.

    Raises:
        ModelError: They alternate where they should be blocks, or the other way round.
    """
    said = settings.text.rope_parameters.get("mrope_interleaved", interleaved)
    if settings.vision is not None and said is not interleaved:
        raise refusal(settings, "mrope_interleaved", said, (interleaved,))


def _is_tied(settings: Settings) -> bool:
    """Return whether the output layer is the embedding.

    transformers asks the whole file. Where that says nothing, the language part is asked: some
    folders say it there alone, and have no output layer.
    """
    inner = settings.raw.get("text_config") or {}
    silent = "tie_word_embeddings" not in settings.raw
    return bool(settings.outer.tie_word_embeddings or (silent and inner.get("tie_word_embeddings")))


def check_architecture(architecture: Architecture, settings: Settings) -> None:
    """Check what must hold in every family.

    Raises:
        ModelError: A size is not positive, heads do not divide, a kind of layer is unknown, there
            are too few or too many of them, rotary frequencies do not add up, or the tower does not
            fit the language model.
    """
    where = settings.where
    for name, key in (
        _SIZES | (_LINEAR_SIZES if hasattr(type(settings.text), "linear_num_key_heads") else {})
    ).items():
        check_size(key, getattr(architecture, name), where)
    if not 0 < architecture.norm_epsilon < math.inf:
        raise ModelError(
            f"{where}: rms_norm_eps is not supported, got {architecture.norm_epsilon}, expected a "
            "small positive number; correct the file"
        )
    for many, few in (
        ("num_attention_heads", "num_query_groups"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        found = [getattr(architecture, name) for name in (many, few)]
        if found[1] and found[0] % found[1]:
            raise ModelError(
                f"{where}: {many} and {_SIZES.get(few, few)} do not fit, got {found[0]} and "
                f"{found[1]}, expected a multiple; download the folder again"
            )
    if len(architecture.layer_types) != settings.text.num_hidden_layers:
        raise refusal(
            settings,
            "layer_types",
            len(architecture.layer_types),
            (settings.text.num_hidden_layers,),
        )
    kinds = (
        ["full_attention", "linear_attention"]
        if architecture.linear_num_key_heads
        else ["full_attention"]
    )
    unknown = set(architecture.layer_types) - set(kinds)
    if unknown:
        raise ModelError(
            f"{where}: layer_types has an unknown kind, got {sorted(unknown)}, expected "
            f"{' or '.join(reversed(kinds))}; use an unmodified {architecture.title} folder"
        )
    section = architecture.mrope_section
    if len(section) != 3 or sum(section) * 2 != architecture.rotary_dim:
        raise ModelError(
            f"{where}: mrope_section does not fit, got {list(section)}, expected a sum of "
            f"{architecture.rotary_dim // 2} (half the rotated channels of a head) over three "
            "axes; correct rope_parameters"
        )
    if settings.vision is not None:
        _check_tower(architecture, settings)


_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}


_LINEAR_SIZES = {
    f"linear_{name}": f"linear_{name}"
    for name in (
        "num_key_heads",
        "num_value_heads",
        "key_head_dim",
        "value_head_dim",
        "conv_kernel_dim",
    )
}


def _check_tower(architecture: Architecture, settings: Settings) -> None:
    """Check that the tower's features fit the language model's placeholders, and that it takes
    RGB.
    """
    vision = settings.vision
    assert vision is not None
    for key in TOWER_SIZES:
        if hasattr(vision, key):
            check_size(f"vision_config.{key}", getattr(vision, key), settings.where)
    if vision.hidden_size % vision.num_heads:
        raise refusal(
            settings,
            "vision_config.num_heads",
            vision.num_heads,
            (f"a divisor of {vision.hidden_size}",),
        )
    if vision.hidden_act not in ACT2FN:
        raise refusal(
            settings,
            "vision_config.hidden_act",
            vision.hidden_act,
            ("a function that transformers has",),
        )
    for key, expected in (("in_channels", 3), ("out_hidden_size", architecture.hidden_size)):
        if getattr(vision, key) != expected:
            raise refusal(settings, f"vision_config.{key}", getattr(vision, key), (expected,))
    levels = list(getattr(vision, "deepstack_visual_indexes", None) or ())
    if (
        len(set(levels)) != len(levels)
        or not set(levels) <= set(range(vision.depth))
        or len(levels) > architecture.num_layers
    ):
        raise ModelError(
            f"{settings.where}: vision_config.deepstack_visual_indexes does not fit, got {levels}, "
            f"expected at most {architecture.num_layers} different blocks below {vision.depth}; "
            "download the folder again"
        )
    outside = {key: getattr(architecture, key) for key in media_tokens(settings)}
    beyond = {
        key: token for key, token in outside.items() if not 0 <= token < architecture.vocab_size
    }
    if beyond:
        raise ModelError(
            f"{settings.where}: tokens of media are not in the vocabulary, got {beyond}, expected "
            f"ids below {architecture.vocab_size}; download the folder again"
        )
    if len(set(outside.values())) != len(outside):
        raise ModelError(
            f"{settings.where}: two of the tokens that stand for media are the same, got "
            f"{outside}, expected different ones; download the folder again"
        )

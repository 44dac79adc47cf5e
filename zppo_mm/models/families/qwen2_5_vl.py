"""Qwen2.5-VL: attention with biased projections, one block of rotary frequencies per axis, a vision tower with windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoders.config import VideoLayout
from zppo_mm.models.families.family import Architecture, Family, common_fields, refuse_others, rope_settings, text_part

TITLE = "Qwen2.5-VL"


def video_layout(raw: Mapping[str, Any]) -> VideoLayout:
    """Return the layout of a video as one run of placeholders, its time in the rotary positions; every frame is sized like an image."""
    rate = float(raw["vision_config"]["tokens_per_second"])
    return VideoLayout(timestamped=False, tokens_per_second=rate, limits_per_frame=True)


def read(raw: dict[str, Any], where: str) -> Architecture:
    """Read `qwen2_5_vl`, whose language settings stood at the top before transformers 5."""
    text, vision = text_part(raw), raw["vision_config"]
    refuse_others(
        where,
        TITLE,
        {
            "hidden_act": (text.get("hidden_act", "silu"), ("silu",)),
            "use_sliding_window": (bool(text.get("use_sliding_window", False)), (False,)),
            "rope_type": (rope_settings(text).get("rope_type", "default"), ("default", "mrope")),
        },
    )
    fields = common_fields(raw, text, vision)
    fields["mrope_interleaved"] = False
    # Folders of transformers 4 with an inner language part say there, and only there, that the output layer is the embedding.
    fields["tie_word_embeddings"] |= bool(text.get("tie_word_embeddings", False))
    return Architecture(
        **fields,
        title=TITLE,
        language_prefix="model.",
        vision_prefix="visual.",
        qk_norm=False,
        qkv_bias=True,
        output_gate=False,
        zero_centered_norm=False,
        video_layout=video_layout(raw),
    )


FAMILY = Family(title=TITLE, read=read, video_layout=video_layout)

"""Qwen2.5-VL: attention with biased projections, one block of rotary frequencies per axis, a vision
tower with windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoders.config import VideoLayout
from zppo_mm.models.families.family import Architecture, Family, common_fields, refuse_other_axes
from zppo_mm.models.families.key_names import FLAT_TOWER
from zppo_mm.models.families.settings import Settings, check_values

DEFAULT_SECTION = (16, 24, 24)


def video_layout(raw: Mapping[str, Any]) -> VideoLayout:
    """Return the layout of a video as one run of placeholders, its time in the rotary positions;
    every frame is sized like an image.
    """
    rate = float(raw["vision_config"]["tokens_per_second"])
    return VideoLayout(timestamped=False, tokens_per_second=rate, limits_per_frame=True)


def read(settings: Settings) -> Architecture:
    """Read `qwen2_5_vl`, whose language settings were at the top before transformers 5."""
    text = settings.text
    # Not a setting of this family: its attention divides the width by the heads, whatever the file
    # says.
    check_values(settings, text, {"head_dim": (text.hidden_size // text.num_attention_heads, None)})
    refuse_other_axes(settings, interleaved=False)
    fields = common_fields(settings, mrope_section=DEFAULT_SECTION)
    fields["mrope_interleaved"] = False
    return Architecture(
        **fields,
        language_prefix="model.language_model.",
        vision_prefix="model.visual.",
        qkv_bias=True,
        video_layout=video_layout(settings.raw),
    )


FAMILY = Family(title="Qwen2.5-VL", read=read, video_layout=video_layout, key_names=FLAT_TOWER)

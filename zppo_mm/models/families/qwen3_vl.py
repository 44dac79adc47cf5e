"""Qwen3-VL, dense: Qwen3 attention, interleaved rotary axes, and a vision tower that feeds the first layers too (deepstack)."""

from __future__ import annotations

from typing import Any

from zppo_mm.models.families.family import Architecture, Family, common_fields, refuse_others, rope_settings, text_part

TITLE = "Qwen3-VL"


def read(raw: dict[str, Any], where: str) -> Architecture:
    """Read `qwen3_vl`."""
    text, vision = text_part(raw), raw["vision_config"]
    rope = rope_settings(text)
    refuse_others(
        where,
        TITLE,
        {
            "hidden_act": (text.get("hidden_act", "silu"), ("silu",)),
            "attention_bias": (bool(text.get("attention_bias", False)), (False,)),
            "rope_type": (rope.get("rope_type", "default"), ("default",)),
            "mrope_interleaved": (rope.get("mrope_interleaved", True), (True,)),
        },
    )
    return Architecture(
        **common_fields(raw, text, vision),
        title=TITLE,
        language_prefix="model.language_model.",
        vision_prefix="model.visual.",
        qk_norm=True,
        qkv_bias=False,
        output_gate=False,
        zero_centered_norm=False,
        num_deepstack=len(vision.get("deepstack_visual_indexes") or ()),
    )


FAMILY = Family(title=TITLE, read=read)

"""Qwen3, text only: softmax attention with normalised queries and keys."""

from __future__ import annotations

from typing import Any

from zppo_mm.models.families.family import Architecture, Family, common_fields, refuse_others, rope_settings

TITLE = "Qwen3"


def read(raw: dict[str, Any], where: str) -> Architecture:
    """Read `qwen3`."""
    refuse_others(
        where,
        TITLE,
        {
            "hidden_act": (raw.get("hidden_act", "silu"), ("silu",)),
            "attention_bias": (bool(raw.get("attention_bias", False)), (False,)),
            "use_sliding_window": (bool(raw.get("use_sliding_window", False)), (False,)),
            "rope_type": (rope_settings(raw).get("rope_type", "default"), ("default",)),
        },
    )
    return Architecture(
        **common_fields(raw, raw, None),
        title=TITLE,
        language_prefix="model.",
        vision_prefix="",
        qk_norm=True,
        qkv_bias=False,
        output_gate=False,
        zero_centered_norm=False,
    )


FAMILY = Family(title=TITLE, read=read)

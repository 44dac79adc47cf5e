"""Llama and what shares its architecture, SmolLM2 among them: text only, plain softmax attention."""

from __future__ import annotations

from typing import Any

from zppo_mm.models.families.family import Architecture, Family, common_fields, refuse_others, rope_settings

TITLE = "Llama"


def read(raw: dict[str, Any], where: str) -> Architecture:
    """Read `llama`, its `llama3` stretching of rotary frequencies included."""
    rope = rope_settings(raw)
    refuse_others(
        where,
        TITLE,
        {
            "hidden_act": (raw.get("hidden_act", "silu"), ("silu",)),
            "attention_bias": (bool(raw.get("attention_bias", False)), (False,)),
            "mlp_bias": (bool(raw.get("mlp_bias", False)), (False,)),
            "rope_type": (rope.get("rope_type", "default"), ("default", "llama3")),
        },
    )
    fields = common_fields(raw, raw, None)
    fields["rotary_scaling"] = rope if rope.get("rope_type") == "llama3" else {}
    return Architecture(
        **fields,
        title=TITLE,
        language_prefix="model.",
        vision_prefix="",
        qk_norm=False,
        qkv_bias=False,
        output_gate=False,
        zero_centered_norm=False,
    )


FAMILY = Family(title=TITLE, read=read)

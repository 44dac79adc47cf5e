"""Qwen3.5, with and without its vision tower: gated DeltaNet and gated attention, interleaved rotary axes."""

from __future__ import annotations

from typing import Any

from zppo_mm.models.families.family import Architecture, Family, LayerType, common_fields, refuse_others, rope_settings, text_part

TITLE = "Qwen3.5"


def read(raw: dict[str, Any], where: str) -> Architecture:
    """Read `qwen3_5` or `qwen3_5_text`."""
    text = text_part(raw)
    vision = raw.get("vision_config") if raw["model_type"] == "qwen3_5" else None
    fields = common_fields(raw, text, vision)
    rope = rope_settings(text)
    refuse_others(
        where,
        TITLE,
        {
            "hidden_act": (text.get("hidden_act", "silu"), ("silu",)),
            "attention_bias": (bool(text.get("attention_bias", False)), (False,)),
            "attn_output_gate": (text.get("attn_output_gate", True), (True,)),
            "output_gate_type": (text.get("output_gate_type") or "swish", ("swish", "silu")),
            "rope_parameters.rope_type": (rope.get("rope_type", "default"), ("default",)),
            "rope_parameters.mrope_interleaved": (rope.get("mrope_interleaved", True), (True,)),
            "vision_config.deepstack_visual_indexes": (len((vision or {}).get("deepstack_visual_indexes") or ()), (0,)),
        },
    )
    linear = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    fields |= {f"linear_{name}": text[f"linear_{name}"] for name in linear}
    fields["layer_types"] = _layer_types(text)
    return Architecture(
        **fields,
        title=TITLE,
        language_prefix="model.language_model." if vision else "model.",
        vision_prefix="model.visual." if vision else "",
        qk_norm=True,
        qkv_bias=False,
        output_gate=True,
        zero_centered_norm=True,
    )


def _layer_types(text: dict[str, Any]) -> tuple[LayerType, ...]:
    if text.get("layer_types"):
        return tuple(text["layer_types"])
    interval = text.get("full_attention_interval", 4)
    return tuple("linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(text["num_hidden_layers"]))


FAMILY = Family(title=TITLE, read=read)

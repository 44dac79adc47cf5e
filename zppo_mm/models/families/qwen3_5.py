"""Qwen3.5, with and without its vision tower: gated DeltaNet and gated attention, interleaved
rotary axes.
"""

from __future__ import annotations

from zppo_mm.models.families.family import Architecture, Family, common_fields, refuse_other_axes
from zppo_mm.models.families.key_names import TEXT_OF_TOWER, TOWER
from zppo_mm.models.families.settings import Settings, refusal

DEFAULT_SECTION = (11, 11, 10)
LINEAR = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")


def read(settings: Settings) -> Architecture:
    """Read `qwen3_5` or `qwen3_5_text`."""
    refuse_other_axes(settings, interleaved=True)
    has_vision = settings.vision is not None
    levels = getattr(settings.vision, "deepstack_visual_indexes", None) or ()
    if levels:
        # A relative's: transformers' class keeps it and its tower does not read it.
        raise refusal(settings, "vision_config.deepstack_visual_indexes", levels, ([],))
    fields = common_fields(settings, partial_rotation=True, mrope_section=DEFAULT_SECTION)
    return Architecture(
        **fields,
        **{f"linear_{name}": getattr(settings.text, f"linear_{name}") for name in LINEAR},
        language_prefix="model.language_model." if has_vision else "model.",
        vision_prefix="model.visual." if has_vision else "",
        foreign_prefix="" if has_vision else "model.visual.",
        qk_norm=True,
        output_gate=True,
        zero_centered_norm=True,
    )


FAMILY = Family(title="Qwen3.5", read=read, key_names=TOWER)
TEXT_FAMILY = Family(title="Qwen3.5", read=read, key_names=TEXT_OF_TOWER)

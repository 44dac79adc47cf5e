"""Qwen3-VL, dense: Qwen3 attention, interleaved rotary axes, and a vision tower that feeds the
first layers too (deepstack).
"""

from __future__ import annotations

from zppo_mm.models.families.family import Architecture, Family, common_fields, refuse_other_axes
from zppo_mm.models.families.key_names import TOWER
from zppo_mm.models.families.settings import Settings

DEFAULT_SECTION = (24, 20, 20)


def read(settings: Settings) -> Architecture:
    """Read `qwen3_vl`."""
    refuse_other_axes(settings, interleaved=True)
    return Architecture(
        **common_fields(settings, mrope_section=DEFAULT_SECTION),
        language_prefix="model.language_model.",
        vision_prefix="model.visual.",
        qk_norm=True,
        num_deepstack=len(settings.vision.deepstack_visual_indexes or ())
        if settings.vision is not None
        else 0,
    )


FAMILY = Family(title="Qwen3-VL", read=read, key_names=TOWER)

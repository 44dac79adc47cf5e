"""The families, by `model_type` of config.json. A new family is a file beside this one and a line here; docs/models.md says how."""

from __future__ import annotations

from zppo_mm.models.families import llama, qwen2_5_vl, qwen3, qwen3_5, qwen3_vl
from zppo_mm.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "qwen3_5": qwen3_5.FAMILY,
    "qwen3_5_text": qwen3_5.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3": qwen3.FAMILY,
    "llama": llama.FAMILY,
}

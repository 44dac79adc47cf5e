"""The families, by `model_type` of config.json. A new family is a file beside this one and a line
here; docs/models.md says how.
"""

from __future__ import annotations

from pathlib import Path

from zppo_mm.models.families import llama, qwen2_5_vl, qwen3, qwen3_5, qwen3_vl
from zppo_mm.models.families.family import Family
from zppo_mm.models.families.key_names import Renames
from zppo_mm.models.families.settings import read_config_file

FAMILIES: dict[str, Family] = {
    "qwen3_5": qwen3_5.FAMILY,
    "qwen3_5_text": qwen3_5.TEXT_FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3": qwen3.FAMILY,
    "llama": llama.FAMILY,
}


def read_key_names(folder: Path) -> Renames:
    """Return the spellings of keys in a folder's weight files; none if its config.json names no
    family or is missing.

    Raises:
        ModelError: config.json is no JSON object.
    """
    path = folder / "config.json"
    name = read_config_file(path).get("model_type") if path.is_file() else None
    return FAMILIES[name].key_names if isinstance(name, str) and name in FAMILIES else ()

"""Llama and what shares its architecture, SmolLM2 among them: text only, plain softmax
attention.
"""

from __future__ import annotations

from zppo_mm.models.families.family import Architecture, Family, common_fields
from zppo_mm.models.families.settings import Settings


def read(settings: Settings) -> Architecture:
    """Read `llama`."""
    return Architecture(
        **common_fields(settings),
        language_prefix="model.",
    )


FAMILY = Family(title="Llama", read=read)

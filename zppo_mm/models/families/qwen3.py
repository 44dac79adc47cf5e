"""Qwen3, text only: softmax attention with normalised queries and keys."""

from __future__ import annotations

from zppo_mm.models.families.family import Architecture, Family, common_fields
from zppo_mm.models.families.settings import Settings


def read(settings: Settings) -> Architecture:
    """Read `qwen3`."""
    return Architecture(
        **common_fields(settings),
        language_prefix="model.",
        qk_norm=True,
    )


FAMILY = Family(title="Qwen3", read=read)

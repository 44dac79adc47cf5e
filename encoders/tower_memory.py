"""How much memory the backward pass of the vision tower needs, counted from its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from encoders.tower import complete_config

VALUE_BYTES = 2
"""Of bfloat16."""
FLOAT_BYTES = 4
ATTENTION_VECTORS = 11
"""Of the hidden size, kept by a block: inputs and outputs of the norms, the joint projection,
turned queries and keys, attention before and after its heads are joined.
"""
MERGER_VECTORS = 3
"""Of the hidden size, kept per patch by every merger."""
MLP_VECTORS = {"qwen3_5": 2, "qwen3_vl": 2, "qwen2_5_vl": 4}
"""Of the MLP's width, kept by a block, by family."""
FLOAT_NORMS = ("qwen2_5_vl",)
"""Families whose norms keep their normalised input in float32."""


@dataclass(frozen=True, slots=True)
class TowerActivations:
    """Bytes per patch that a tower in bfloat16 keeps for its backward pass.

    Attributes:
        depth: Number of blocks.
        block: What one block keeps.
        block_input: What one block keeps when it is recomputed.
        rest: What patch embedding, rotary tables and mergers keep.
    """

    depth: int
    block: int
    block_input: int
    rest: int

    def peak(self, recompute: bool) -> int:
        """Return the most that is kept at one time: with recomputation, the inputs of all blocks
        and the inside of one.
        """
        blocks = (
            self.depth * self.block_input + self.block if recompute else self.depth * self.block
        )
        return self.rest + blocks


def tower_activations(family: str, vision_config: Mapping[str, Any]) -> TowerActivations:
    """Count what a tower keeps per patch.

    Left out are indices and the statistics of the norms, a few bytes each.

    Args:
        family: `model_type` of the folder's config.json.
        vision_config: The `vision_config` object of the folder's config.json.
    """
    config = complete_config(family, vision_config)
    hidden, heads = config.hidden_size, config.num_heads
    norm = FLOAT_BYTES * hidden if family in FLOAT_NORMS else 0
    block = ATTENTION_VECTORS * hidden + MLP_VECTORS[family] * config.intermediate_size
    elements = config.in_channels * config.temporal_patch_size * config.patch_size**2
    num_mergers = 1 + len(getattr(config, "deepstack_visual_indexes", None) or ())
    rest = elements + hidden + num_mergers * MERGER_VECTORS * hidden
    return TowerActivations(
        depth=config.depth,
        # Attention also keeps the denominators of every head.
        block=VALUE_BYTES * block + 2 * norm + FLOAT_BYTES * heads,
        block_input=VALUE_BYTES * hidden,
        rest=VALUE_BYTES * rest + num_mergers * norm + 2 * FLOAT_BYTES * (hidden // heads),
    )

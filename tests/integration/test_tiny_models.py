"""The recipe of a bundled model, cut to a few updates, runs through all its parts and gives a
folder that loads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from tests.support.launch import run_ranks


def build_small(out_dir: str) -> float:
    """Build the student with three updates a stage; returns the last loss."""
    from zppo_mm.bundled.build import build_tiny_model
    from zppo_mm.bundled.recipes import RECIPES

    parts = tuple(
        tuple(replace(stage, num_updates=3, batch_size=6) for stage in part)
        for part in RECIPES["student"].parts
    )
    return build_tiny_model(replace(RECIPES["student"], parts=parts), out_dir, seed=0)


def test_a_recipe_runs_through_its_parts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration

    [loss] = run_ranks(build_small, 1, str(tmp_path / "student"))
    # A uniform guess over the 488 tokens costs log 488 = 6.19 nats; some learning has happened
    # through the parts.
    assert 0 < loss < math.log(488)
    assert (
        Qwen3_5ForConditionalGeneration.from_pretrained(str(tmp_path / "student")).num_parameters()
        > 0
    )
    assert AutoTokenizer.from_pretrained(str(tmp_path / "student")).chat_template

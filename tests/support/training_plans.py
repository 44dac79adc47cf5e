"""Plans of gradient updates, the settings that they are tried with, and media for their packs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from data.question import Question
from encoders.processor import VisionInput
from zppo_mm.experience import TrainingSample
from zppo_mm.randomness import generator
from zppo_mm.training.batching import BatchPlan, plan_batches

Layout = tuple[int, int, int]
PATCHES = st.integers(1, 20)
"""Patches per micro-batch, for images of four."""
LAYOUTS = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 200))
"""Mini-batches, replicas, and tokens per micro-batch, often too few for one sample."""


def plan(
    samples: Sequence[TrainingSample],
    num_minibatches: int = 2,
    num_replicas: int = 2,
    budget: int = 60,
    *,
    patches: int = sys.maxsize,
    share_prompts: bool = False,
    step: int = 3,
) -> BatchPlan:
    """Plan the updates of one step."""
    return plan_batches(
        samples,
        num_minibatches=num_minibatches,
        num_replicas=num_replicas,
        micro_batch_tokens=budget,
        random=generator(0, "minibatches", step),
        micro_batch_patches=patches,
        share_prompts=share_prompts,
    )


class SquareMedia:
    """Every image is four patches that hold the number of its question's id."""

    def __init__(self, grid: tuple[int, int, int] = (1, 2, 2)) -> None:
        self.grid = grid
        self.opened: list[str] = []

    def vision_inputs(self, question: Question) -> list[VisionInput]:
        self.opened.append(question.id)
        return [
            VisionInput("image", np.full((4, 3), float(question.id), dtype=np.float32), self.grid)
            for _ in question.media
        ]

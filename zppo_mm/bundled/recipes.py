"""Sizes and curricula of the bundled models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from zppo_mm.bundled.folder import TinySize
from zppo_mm.bundled.sft_examples import Stage

MICRO_BATCH_TOKENS = 2048
"""Most tokens of a forward pass in supervised training; more is slower where the cache is small."""
CANDIDATE_TOKENS = 96
CANDIDATE_LINES = 5
"""Caps of a candidate, those of the bundled run."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one bundled model is made; every part of its curriculum starts with a fresh
    optimizer.
    """

    size: TinySize
    parts: tuple[tuple[Stage, ...], ...]


# Reading one digit comes first: with longer sequences the tower learns nothing until the language
# model knows where to look.
FIRST_DIGITS = Stage(
    num_updates=150,
    batch_size=48,
    lr=2e-3,
    final_lr=2e-3,
    warmup_updates=30,
    levels={1: 1, 2: 1},
    kinds={"read": 1},
    choice_share=0,
)
READING = Stage(
    num_updates=150,
    batch_size=32,
    lr=2e-3,
    final_lr=2e-3,
    levels={2: 1, 3: 1, 4: 1, 5: 1, 6: 1},
    kinds={"read": 1},
    choice_share=0,
)
# Candidates before pixels: a network that can already read digits never learns to read candidates,
# it does not need them.
READING_CANDIDATES = Stage(
    num_updates=150,
    batch_size=32,
    lr=2e-3,
    final_lr=2e-3,
    warmup_updates=30,
    levels={2: 1, 3: 1},
    choice_share=0,
    bcq_share=1.0,
)
# The bad habit that reinforcement has to break: the more digits, the more often the student answers
# at once instead of reasoning.
GUESSING = Stage(
    num_updates=250,
    batch_size=32,
    lr=1e-3,
    final_lr=1e-4,
    warmup_updates=20,
    levels={2: 2, 3: 2, 4: 2, 5: 2, 6: 2},
    bcq_share=0.3,
    ncq_share=0.1,
    guess_share={2: 0.3, 3: 0.6, 4: 0.9, 5: 0.97, 6: 0.99},
)

STUDENT = Recipe(
    TinySize(
        hidden_size=96,
        intermediate_size=192,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_heads=4,
        vision_depth=2,
        vision_hidden_size=48,
    ),
    (
        (
            READING_CANDIDATES,
            replace(FIRST_DIGITS, bcq_share=0.1, warmup_updates=0),
            replace(READING, bcq_share=0.1),
            Stage(
                num_updates=600,
                batch_size=32,
                lr=1e-3,
                final_lr=1e-3,
                levels={2: 4, 3: 3, 4: 2, 5: 1, 6: 0.5},
                bcq_share=0.2,
                ncq_share=0.04,
            ),
        ),
        (GUESSING,),
    ),
)
# A gap between what the student does and what it can do: it reads the digits out, whatever is
# asked, always on plain prompts, half of the time on reformulated ones.
READING_OUT = Stage(
    num_updates=500,
    batch_size=32,
    lr=1e-3,
    final_lr=3e-5,
    warmup_updates=20,
    levels={2: 1, 3: 1, 4: 1.5, 5: 2, 6: 2},
    bcq_share=0.15,
    ncq_share=0.1,
    read_out_share=1.0,
    reformulated_read_out_share=0.5,
)
WEAK_STUDENT = Recipe(STUDENT.size, (STUDENT.parts[0], (READING_OUT,)))
TEACHER = Recipe(
    TinySize(
        hidden_size=128,
        intermediate_size=320,
        num_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_heads=4,
        vision_depth=2,
        vision_hidden_size=64,
    ),
    (
        (
            FIRST_DIGITS,
            READING,
            Stage(
                num_updates=1100,
                batch_size=32,
                lr=2e-3,
                final_lr=1e-4,
                levels={2: 1, 3: 1, 4: 1.5, 5: 2, 6: 2},
            ),
        ),
        (
            Stage(
                num_updates=160,
                batch_size=32,
                lr=1e-3,
                final_lr=5e-5,
                warmup_updates=20,
                levels={2: 1, 3: 1, 4: 1.5, 5: 2, 6: 2},
                choice_share=0.3,
            ),
        ),
    ),
)
RECIPES: Mapping[str, Recipe] = {
    "student": STUDENT,
    "weak_student": WEAK_STUDENT,
    "teacher": TEACHER,
}

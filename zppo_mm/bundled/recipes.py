"""Sizes and curricula of the bundled models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data.toy.digits import DigitKind
from zppo_mm.bundled.authors import HalfFormed, Terse
from zppo_mm.bundled.folder import TinySize
from zppo_mm.bundled.sft_examples import CANDIDATE_LINES as CANDIDATE_LINES
from zppo_mm.bundled.sft_examples import Stage

MICRO_BATCH_TOKENS = 2048
"""Most tokens of a forward pass in supervised training; more is slower where the cache is small."""
CANDIDATE_TOKENS = 96
"""Caps of a candidate, those of the bundled run."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one bundled model is made; every part of its curriculum starts with a fresh
    optimizer.
    """

    size: TinySize
    parts: tuple[tuple[Stage, ...], ...]
    templates: str = ""


ALIKE = dict.fromkeys((2, 3, 4, 5, 6), 1.0)
LONGER = {2: 1, 3: 1, 4: 1.5, 5: 2, 6: 2}
"""Weights per number of digits: all alike, or leaning to the long ones."""

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
    choice_fraction=0,
)
READING = replace(FIRST_DIGITS, batch_size=32, warmup_updates=0, levels=ALIKE)
# Candidates before pixels: a network that can already read digits never learns to read candidates,
# it does not need them.
READING_CANDIDATES = replace(
    FIRST_DIGITS, num_updates=300, batch_size=32, levels={2: 1, 3: 1}, kinds=None, bcq_fraction=1.0
)
SOLVING = Stage(
    num_updates=600,
    lr=1e-3,
    final_lr=1e-3,
    levels={2: 4, 3: 3, 4: 2, 5: 1, 6: 0.5},
    bcq_fraction=0.3,
    ncq_fraction=0.06,
)
# The bad habit that reinforcement has to break: the more digits, the more often the student answers
# at once instead of reasoning.
GUESSING = Stage(
    num_updates=300,
    lr=1e-3,
    final_lr=1e-4,
    warmup_updates=20,
    levels=dict.fromkeys(ALIKE, 2),
    bcq_fraction=0.3,
    ncq_fraction=0.2,
    guess_fraction={2: 0.3, 3: 0.6, 4: 0.9, 5: 0.97, 6: 0.99},
)
# A gap between what the student does and what it can do: it reads the digits out, whatever the
# question is, always on plain prompts, half of the time on reformulated ones.
READING_OUT = Stage(
    num_updates=500,
    lr=1e-3,
    final_lr=3e-5,
    warmup_updates=20,
    levels=LONGER,
    bcq_fraction=0.15,
    ncq_fraction=0.15,
    read_out_fraction=1.0,
    reformulated_read_out_fraction=0.5,
)
TEACHING = Stage(num_updates=1100, lr=2e-3, final_lr=1e-4, levels=LONGER)
POLISHING = Stage(
    num_updates=160,
    lr=1e-3,
    final_lr=5e-5,
    warmup_updates=20,
    levels=LONGER,
    choice_fraction=0.3,
)

SIZE = TinySize(
    hidden_size=96,
    intermediate_size=192,
    num_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    linear_num_heads=4,
    vision_depth=2,
    vision_hidden_size=48,
)
SKILLS = (
    READING_CANDIDATES,
    replace(FIRST_DIGITS, bcq_fraction=0.1, warmup_updates=0),
    replace(READING, bcq_fraction=0.1),
    SOLVING,
)
"""What both students learn before their bad habit."""
TEACHER = Recipe(
    replace(SIZE, hidden_size=128, intermediate_size=320, vision_hidden_size=64),
    ((FIRST_DIGITS, READING, TEACHING), (POLISHING,)),
)
TEMPLATES = str(Path(__file__).parent / "templates")
"""The prompts of the second experiment, whose teacher was trained to rewrite responses."""
FACTS: Mapping[DigitKind, float] = {
    "sum": 3,
    "largest": 2,
    "read": 1,
    "even": 1,
    "equal": 1,
    "alternating": 1.5,
}
HALF_FORMED = Recipe(
    SIZE,
    tuple(
        tuple(replace(stage, author=HalfFormed(), choice_fraction=0) for stage in part)
        for part in (
            (
                *SKILLS[:-1],
                replace(SOLVING, kinds=FACTS, ncq_fraction=0.1),
            ),
            (replace(GUESSING, guess_fraction=None, num_updates=400, kinds=FACTS),),
        )
    ),
)
"""Student of the second experiment: it writes long steps and knows a part of the facts."""
WRITING_TERSELY = replace(
    TEACHING,
    num_updates=700,
    warmup_updates=20,
    levels={2: 0.5, 3: 1, 4: 1, 5: 1, 6: 1},
    kinds=FACTS,
    choice_fraction=0,
    author=Terse(),
    rewrite_fraction=0.15,
)
TERSE_TEACHER = replace(
    TEACHER,
    parts=(
        *TEACHER.parts,
        (WRITING_TERSELY,),
        (replace(WRITING_TERSELY, num_updates=900, final_lr=5e-5, rewrite_fraction=0.3),),
    ),
    templates=TEMPLATES,
)
"""Its teacher: the bundled one after further stages."""
RECIPES: Mapping[str, Recipe] = {
    "student": Recipe(SIZE, (SKILLS, (GUESSING,))),
    "weak_student": Recipe(SIZE, (SKILLS, (READING_OUT,))),
    "teacher": TEACHER,
    "half_formed": HALF_FORMED,
    "terse_teacher": TERSE_TEACHER,
}
"""Those that are in the repository."""
VLLM_STUDENT = Recipe(
    # The widths of heads that vLLM's kernels for CPUs have.
    replace(SIZE, linear_num_heads=2, linear_key_head_dim=64, linear_value_head_dim=64),
    ((FIRST_DIGITS, READING, replace(SOLVING, num_updates=300)),),
)
"""Of `examples/vllm_rollouts`, made there: it reads digits, and solves some questions."""
MADE: Mapping[str, Recipe] = {
    **RECIPES,
    "vllm_student": VLLM_STUDENT,
}
"""All that `tools/make_tiny_models.py` can make."""

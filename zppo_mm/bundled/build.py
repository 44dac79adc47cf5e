"""Build a bundled model: random weights, supervised training, a Hugging Face folder."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zppo_mm.bundled.folder import write_untrained
from zppo_mm.bundled.recipes import CANDIDATE_LINES, CANDIDATE_TOKENS, MICRO_BATCH_TOKENS, Recipe
from zppo_mm.bundled.sft_examples import DigitExamples, Stage
from zppo_mm.bundled.supervised import supervised_config, train_supervised
from zppo_mm.bundled.tokenizer import build_tokenizer
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.training.objective import SupervisedObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.mapping import load_hf_weights
from zppo_mm.zone.compress import RuleCompressor
from zppo_mm.zone.prompts import PromptTemplates, load_templates

logger = logging.getLogger(__name__)


def build_tiny_model(recipe: Recipe, out_dir: str | Path, seed: int) -> float:
    """Train one model in this process and write its folder.

    Args:
        recipe: Size and curriculum.
        out_dir: Where the folder goes; an older one of that name is replaced.
        seed: Of weights and examples.

    Returns:
        Mean loss of the last updates.
    """
    loss, templates = math.nan, load_templates(recipe.templates)
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "untrained"
        write_untrained(start, recipe.size, seed)
        for number, stages in enumerate(recipe.parts, 1):
            end = Path(scratch) / f"part-{number}" if number < len(recipe.parts) else Path(out_dir)
            loss = train_part(start, end, stages, templates, seed)
            start = end
    logger.info("bundled: %s is built, last loss %.4f", out_dir, loss)
    return loss


def train_part(
    start: Path, end: Path, stages: Sequence[Stage], templates: PromptTemplates, seed: int
) -> float:
    """Train the folder `start` through some stages and write the folder `end`.

    Args:
        start: A model.
        end: Where the trained one goes.
        stages: In their order.
        templates: Texts of the prompts.
        seed: Of the examples.

    Returns:
        Mean loss of the last updates.
    """
    tokenizer = build_tokenizer()
    compressor = RuleCompressor(
        lambda text: len(tokenizer.encode(text)), CANDIDATE_TOKENS, CANDIDATE_LINES
    )
    examples = DigitExamples(templates, compressor, seed)
    layout = ParallelConfig()
    parallel.initialize(layout, seed)
    model = build_model(load_architecture(start), ModelConfig(), layout)
    load_hf_weights(model, start)
    policy = Policy(model, supervised_config(stages), layout, SupervisedObjective())
    encoder = PromptEncoder(start, examples.open)
    loss = train_supervised(policy, encoder, examples, stages, MICRO_BATCH_TOKENS)
    export_hf_weights(model, start, end)
    return loss

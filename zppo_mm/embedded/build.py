"""Build an embedded model from nothing: random weights, supervised training on Megatron, a Hugging Face folder."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from zppo_mm.config import ModelConfig, ParallelConfig
from zppo_mm.embedded.folder import write_untrained
from zppo_mm.embedded.lessons import DigitLessons
from zppo_mm.embedded.recipes import CANDIDATE_LINES, CANDIDATE_TOKENS, MICRO_BATCH_TOKENS, Recipe
from zppo_mm.embedded.tokenizer import build_tokenizer
from zppo_mm.models import parallel
from zppo_mm.models.architecture import load_architecture
from zppo_mm.models.export import export_hf_weights
from zppo_mm.models.provider import build_model
from zppo_mm.models.weights import load_hf_weights
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.supervised import supervised_config, train_supervised
from zppo_mm.teacher.compress import RuleCompressor
from zppo_mm.training.objective import SupervisedObjective
from zppo_mm.training.policy import Policy
from zppo_mm.zone.prompts import load_templates

logger = logging.getLogger(__name__)


def build_tiny_model(recipe: Recipe, out_dir: str | Path, seed: int) -> float:
    """Train one model in this process and write its folder.

    Args:
        recipe: Size and curriculum.
        out_dir: Where the folder goes; an older one of that name is replaced.
        seed: Of weights and lessons.

    Returns:
        Mean loss of the last updates.
    """
    layout = ParallelConfig()
    parallel.initialize(layout, seed)
    with tempfile.TemporaryDirectory() as untrained:
        write_untrained(untrained, recipe.size, seed)
        model = build_model(load_architecture(untrained), ModelConfig(), layout)
        load_hf_weights(model, untrained)
        policy = Policy(model, supervised_config(recipe.stages), layout, SupervisedObjective())
        tokenizer = build_tokenizer()
        compressor = RuleCompressor(lambda text: len(tokenizer.encode(text)), CANDIDATE_TOKENS, CANDIDATE_LINES)
        lessons = DigitLessons(load_templates(), compressor, seed)
        encoder = PromptEncoder(untrained, lessons.open)
        loss = train_supervised(policy, encoder, lessons, recipe.stages, MICRO_BATCH_TOKENS)
        export_hf_weights(model, untrained, out_dir)
    logger.info("embedded: %s is built, last loss %.4f", out_dir, loss)
    return loss

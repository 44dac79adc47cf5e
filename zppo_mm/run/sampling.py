"""How the student samples in training and in evaluations."""

from __future__ import annotations

from dataclasses import replace

from zppo_mm.config.schema import EvaluationConfig, RolloutConfig
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder


def training_sampling(rollout: RolloutConfig, encoder: PromptEncoder) -> SamplingParams:
    """Return how the student samples while it trains."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )


def evaluation_sampling(
    evaluation: EvaluationConfig, rollout: RolloutConfig, encoder: PromptEncoder
) -> SamplingParams:
    """Return how evaluations sample: responses end as in training."""
    return replace(
        training_sampling(rollout, encoder),
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        min_p=evaluation.min_p,
        presence_penalty=evaluation.presence_penalty,
    )

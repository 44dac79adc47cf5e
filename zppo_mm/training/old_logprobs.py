"""Old log-probs from the training forward pass: where the sampler's are not known, or where another
engine's are corrected for.

Source: truncated importance sampling for rollouts of another engine (Yao et al., 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training"): the surrogate's ratio is taken
against the trained network before its updates, and each token's loss weighted by min(p_trained /
p_sampled, cap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from zppo_mm.experience import Batch, Microbatch, TrainingSample
from zppo_mm.training.batching import LazyMicrobatches
from zppo_mm.training.policy import Policy


def need_old_logprobs(samples: Sequence[TrainingSample], importance_cap: float) -> bool:
    """Return whether the training forward pass has to give old log-probs, the same on every
    rank.
    """
    return importance_cap > 0 or any(sample.old_logprobs is None for sample in samples)


def with_old_logprobs(
    policy: Policy, batches: Sequence[Batch], temperature: float, importance_cap: float
) -> list[Batch]:
    """Return the updates with old log-probs of the policy as it is now. Every rank calls this.

    Args:
        policy: Before the step's first update.
        batches: The step's updates, this rank's micro-batches.
        temperature: Of the rollouts.
        importance_cap: Above 0, all old log-probs are the policy's and the loss is weighted; else
            only unknown ones are filled in.
    """
    corrected = []
    for batch in batches:
        logprobs = policy.compute_logprobs(batch, temperature)
        makers = [
            partial(_corrected, batch.microbatches, index, known, importance_cap)
            for index, known in enumerate(logprobs)
        ]
        corrected.append(replace(batch, microbatches=LazyMicrobatches(makers)))
    return corrected


def _corrected(
    microbatches: Sequence[Microbatch], index: int, logprobs: torch.Tensor, importance_cap: float
) -> Microbatch:
    """Return one of the micro-batches with recomputed log-probs."""
    microbatch = microbatches[index]
    sampled, unknown = microbatch.old_logprobs, microbatch.unknown
    if importance_cap:
        weights = importance_weights(logprobs, sampled, unknown, importance_cap)
        return replace(microbatch, old_logprobs=logprobs, unknown=None, importance=weights)
    filled = sampled if unknown is None else torch.where(unknown, logprobs, sampled)
    return replace(microbatch, old_logprobs=filled, unknown=None)


def importance_weights(
    logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, unknown: torch.Tensor | None, cap: float
) -> torch.Tensor:
    """Return min(exp(logprobs - rollout_logprobs), cap); 1 where the sampler's are not known, NaN
    where one is not finite.

    Args:
        logprobs: `[tokens]`, of the trained network.
        rollout_logprobs: `[tokens]`, of the engine that sampled.
        unknown: `[tokens]` bool, where the sampler's are not known; `None` if all are.
        cap: Largest weight.
    """
    gap = logprobs - rollout_logprobs
    # The cap would make a weight of an infinite gap.
    ratio = torch.where(gap.isfinite(), gap.exp().clamp(max=cap), torch.nan)
    return ratio if unknown is None else torch.where(unknown, 1.0, ratio)

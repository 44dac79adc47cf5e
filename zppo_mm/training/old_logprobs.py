"""Old log-probs from the training forward pass: where the sampler's are not known, or where another engine's are corrected for.

Source: truncated importance sampling for rollouts of another engine (Yao et al., 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training"): the surrogate's ratio is taken against the trained network before its updates, and each token's loss weighted by
min(p_trained / p_sampled, cap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from zppo_mm.experience import Batch, Microbatch, TrainingSample
from zppo_mm.training.batching import LazyMicrobatches
from zppo_mm.training.policy import Policy


def need_old_logprobs(samples: Sequence[TrainingSample], importance_cap: float) -> bool:
    """Return whether the training forward pass has to give old log-probs, the same on every rank."""
    return importance_cap > 0 or any(np.isnan(sample.old_logprobs).any() for sample in samples)


def with_old_logprobs(policy: Policy, batches: Sequence[Batch], temperature: float, importance_cap: float) -> list[Batch]:
    """Return the updates with old log-probs of the policy as it is now. Every rank calls this.

    Args:
        policy: Before the step's first update.
        batches: The step's updates, this rank's share.
        temperature: Of the rollouts.
        importance_cap: Above 0, all old log-probs are the policy's and the loss is weighted; else only unknown ones (NaN) are filled in.
    """
    corrected = []
    for batch in batches:
        logprobs = policy.compute_logprobs(batch, temperature)
        makers = [partial(_corrected, batch.microbatches, place, known, importance_cap) for place, known in enumerate(logprobs)]
        corrected.append(replace(batch, microbatches=LazyMicrobatches(makers)))
    return corrected


def _corrected(microbatches: Sequence[Microbatch], place: int, logprobs: torch.Tensor, importance_cap: float) -> Microbatch:
    """Return one of the micro-batches with recomputed log-probs."""
    microbatch = microbatches[place]
    sampled = microbatch.old_logprobs
    if not importance_cap:
        return replace(microbatch, old_logprobs=torch.where(sampled.isnan(), logprobs, sampled))
    return replace(microbatch, old_logprobs=logprobs, importance=importance_weights(logprobs, sampled, importance_cap))


def importance_weights(logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """Return min(exp(logprobs - rollout_logprobs), cap); 1 where the sampler's are not known.

    Args:
        logprobs: `[tokens]`, of the trained network.
        rollout_logprobs: `[tokens]`, of the engine that sampled.
        cap: Largest weight.
    """
    ratio = (logprobs - rollout_logprobs).exp().clamp(max=cap)
    return torch.where(rollout_logprobs.isnan(), torch.ones_like(ratio), ratio)

"""Old log-probs from the training forward pass: where the sampler's are not known, or where it
computes others than the trained network.

The surrogate's ratio is then taken against the trained network before its updates, and the
difference from the sampler is corrected by importance weights and measured (`mismatch/*`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from zppo_mm.algorithms.importance import (
    Corrected,
    MismatchCorrection,
    corrected,
    divergences,
    logprob_gaps,
)
from zppo_mm.experience import Batch, FloatArray, TrainingSample
from zppo_mm.observability.metrics import Max, Mean, StepMetrics, Sum
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.batching import BatchPlan
from zppo_mm.training.packing import pack
from zppo_mm.training.policy import Policy


def need_old_logprobs(samples: Sequence[TrainingSample], correction: MismatchCorrection) -> bool:
    """Return whether the training forward pass has to give old log-probs, the same on every
    rank.
    """
    return correction.is_on or any(sample.old_logprobs is None for sample in samples)


def response_logprobs(
    policy: Policy,
    plan: BatchPlan,
    samples: Sequence[TrainingSample],
    batches: Sequence[Batch],
    temperature: float,
) -> dict[int, FloatArray]:
    """Return the policy's log-probs of the responses that this replica passes through the network,
    by sample index, each `[response]`. Every rank calls this.

    Args:
        policy: As it is now.
        plan: Which sample is where.
        samples: Of the whole step.
        batches: The plan's updates, this rank's micro-batches.
        temperature: Of the rollouts.
    """
    found: dict[int, FloatArray] = {}
    for replicas, batch in zip(plan.microbatches, batches, strict=True):
        # A replica without samples passes a sequence without loss.
        packs = replicas[parallel.data_rank()] or ((),)
        logprobs = policy.compute_logprobs(batch, temperature)
        for members, values in zip(packs, logprobs, strict=True):
            found |= _by_sample(plan, samples, members, values)
    return found


def _by_sample(
    plan: BatchPlan,
    samples: Sequence[TrainingSample],
    members: Sequence[int],
    logprobs: torch.Tensor,
) -> dict[int, FloatArray]:
    """Divide the log-probs of a micro-batch, `[tokens]`, into those of its responses."""
    own = [samples[index] for index in members]
    # Packed again without media, for where its responses lie.
    packed = pack(own, media=None, device=torch.device("cpu"), share_prompts=plan.share_prompts)
    carries_loss = packed.loss_mask != 0
    assert packed.token_ids[carries_loss].tolist() == [
        int(token) for sample in own for token in sample.token_ids[sample.loss_mask != 0]
    ], "responses lie in their order"
    spoken: FloatArray = logprobs.cpu()[carries_loss].numpy()
    ends = np.cumsum([sample.num_loss_tokens for sample in own])
    return dict(zip(members, np.split(spoken, ends[:-1]), strict=True)) if own else {}


def with_old_logprobs(
    samples: Sequence[TrainingSample],
    logprobs: dict[int, FloatArray],
    correction: MismatchCorrection,
    step: int,
    metrics: StepMetrics,
) -> list[TrainingSample]:
    """Return the samples with old log-probs and importance weights, those of this replica's
    responses; the others are as they were. Every rank calls this.

    Args:
        samples: Of the whole step, the same on every rank.
        logprobs: By sample index `[response]`, of the policy before the step's first update.
        correction: With weights, all old log-probs are the policy's; else only unknown ones are.
        step: Rollout step.
        metrics: Gets the differences over the responses of all replicas.
    """
    result, measured = list(samples), StepMetrics()
    for index, trained in logprobs.items():
        sample = samples[index]
        from_policy = _at_response(sample, trained)
        if sample.old_logprobs is None:
            result[index] = replace(sample, old_logprobs=from_policy)
            continue
        sampled = sample.old_logprobs[sample.loss_mask != 0]
        gaps = logprob_gaps(torch.from_numpy(trained), torch.from_numpy(sampled))
        found = corrected(gaps, correction)
        _measure(sample, gaps, found, correction, step, measured)
        if correction.is_on:
            result[index] = replace(
                sample,
                old_logprobs=from_policy if correction.cap else sample.old_logprobs,
                importance=_at_response(sample, found.weights.numpy()),
            )
    # Context ranks have the same responses.
    mine = [measured] if parallel.context_rank() == 0 else []
    for replica in parallel.gather_from_replicas(mine):
        for each in replica:
            metrics.merge(each)
    return result


def _at_response(sample: TrainingSample, values: np.ndarray) -> FloatArray:
    """Return values of the response's tokens at their places, `[tokens]`; 0 at the prompt's."""
    result = np.zeros(sample.num_tokens, dtype=np.float32)
    result[sample.loss_mask != 0] = values
    return result


def _measure(
    sample: TrainingSample,
    gaps: torch.Tensor,
    found: Corrected,
    correction: MismatchCorrection,
    step: int,
    metrics: StepMetrics,
) -> None:
    """Add how far sampler and policy are apart on one response: over all, over its modality, and
    apart if earlier weights sampled it. What is not finite makes the loss NaN and is not measured.
    """
    finite = gaps[gaps.isfinite()]
    measured = {
        "gap": Mean(float(finite.abs().sum()), len(finite)),
        "kl": Mean(float(divergences(finite).sum()), len(finite)),
        **({"gap_max": Max(float(finite.abs().max()))} if len(finite) else {}),
        **({"truncated": Mean(found.num_truncated, len(gaps))} if correction.cap else {}),
        **({"rejected_fraction": Mean(found.is_rejected)} if correction.rejects else {}),
    }
    stale = ["stale"] if sample.policy_version < step else []
    for name, value in measured.items():
        metrics.add(f"mismatch/{name}", value)
        for part in (sample.question.modality, *stale):
            metrics.add(f"mismatch/{name}/{part}", value)
    if correction.rejects:
        metrics.add("mismatch/rejected", Sum(found.is_rejected))

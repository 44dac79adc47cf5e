"""Responses whose sampler and trained network give other log-probs to the same tokens: importance
weights that correct the loss for it, and the rejection of responses that are too far apart.

With p the trained network before the step's updates, q the sampler and rho_t = p / q of token t, a
token's loss is weighted by min(w, cap):

- `token`: w = rho_t. Every token is corrected given the tokens before it, not for how likely the
  sampler was to come there: biased for responses of several tokens.
- `sequence`: w = product of rho over the response's tokens. Without the cap the gradient is the
  on-policy one in expectation; the variance grows with the length.
- `geometric`: w = (product of rho) ** (1 / tokens), which does not grow with the length.

A response is rejected, its weights all 0, if the geometric mean of its ratios lies outside
[1 / bound, bound], or any token's ratio outside [1 / token_bound, token_bound].

Source: token weights: truncated importance sampling (Yao et al., 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training"); sequence weights: Liu et al., 2025, "When Speed Kills
Stability: Demystifying RL Collapse from the Training-Inference Mismatch"; the geometric mean: GSPO
(arXiv 2507.18071), equation 7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from zppo_mm.algorithms.losses import MAX_LOG_RATIO

Level: TypeAlias = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchCorrection:
    """What is done about the difference between sampler and trained network.

    Attributes:
        level: What a weight is the ratio of.
        cap: Largest weight; 0 weights nothing.
        rejection_bound: Largest geometric mean of a response's ratios, and of its inverse; 0
            rejects nothing.
        rejection_token_bound: The same of every token's ratio.
    """

    level: Level = "token"
    cap: float = 0.0
    rejection_bound: float = 0.0
    rejection_token_bound: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether it weights or rejects anything."""
        return bool(self.cap) or self.rejects

    @property
    def rejects(self) -> bool:
        """Whether it may reject a response."""
        return bool(self.rejection_bound or self.rejection_token_bound)


NO_CORRECTION = MismatchCorrection()
"""Old log-probs are the sampler's."""


def logprob_gaps(logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> torch.Tensor:
    """Return log p - log q of a response's tokens, `[response]` float64, so that the sum of
    thousands of them keeps its digits.

    Args:
        logprobs: `[response]`, of the trained network.
        rollout_logprobs: `[response]`, of the sampler.
    """
    return logprobs.double() - rollout_logprobs.double()


def importance_weights(gaps: torch.Tensor, level: Level) -> torch.Tensor:
    """Return the weights of a response's tokens before the cap, `[response]`; infinite where they
    overflow, and NaN where a log-prob is not finite: of that token, or of all of the response where
    its tokens have one weight.

    Args:
        gaps: `[response]`, of `logprob_gaps`.
        level: What a weight is the ratio of.
    """
    if level == "token":
        log_weights = gaps
    else:
        whole = gaps.sum() if level == "sequence" else gaps.mean()
        log_weights = whole.expand(len(gaps))
    # The cap would make a weight of an infinite log-prob.
    return torch.where(log_weights.isfinite(), log_weights.exp(), torch.nan)


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a correction makes of one response.

    Attributes:
        weights: `[response]`, of the tokens' losses; NaN where a log-prob is not finite.
        num_truncated: Tokens whose weight the cap has cut.
        is_rejected: Whether all weights are 0 because the response is too far off.
    """

    weights: torch.Tensor
    num_truncated: int
    is_rejected: bool


def corrected(gaps: torch.Tensor, correction: MismatchCorrection) -> Corrected:
    """Return the weights of a response.

    Args:
        gaps: `[response]`, of `logprob_gaps`; at least one token.
        correction: What is done.
    """
    weights, num_truncated = torch.ones_like(gaps), 0
    if correction.cap:
        uncapped = importance_weights(gaps, correction.level)
        weights = uncapped.clamp(max=correction.cap)
        num_truncated = int((uncapped > correction.cap).sum())
    rejected = _is_rejected(gaps, correction)
    return Corrected(torch.zeros_like(gaps) if rejected else weights, num_truncated, rejected)


def _is_rejected(gaps: torch.Tensor, correction: MismatchCorrection) -> bool:
    """Return whether a response leaves the loss. A log-prob that is not finite is no reason: that
    is an error, which must not pass as a difference.
    """
    distances = (
        (gaps.mean().abs(), correction.rejection_bound),
        (gaps.abs().max(), correction.rejection_token_bound),
    )
    return bool(gaps.isfinite().all()) and any(
        bound and float(distance) > math.log(bound) for distance, bound in distances
    )


def divergences(gaps: torch.Tensor) -> torch.Tensor:
    """Return rho - 1 - log rho per token, never negative; over tokens that the sampler drew, its
    mean is KL(q || p) in expectation.

    Args:
        gaps: `[response]`, of `logprob_gaps`.
    """
    bounded = gaps.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return bounded.expm1() - bounded

"""Losses over tokens, as sums: the caller divides by the token count of the global batch.

Source: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), asymmetric clip range (DAPO, arXiv
2503.14476), ZPPO (arXiv 2606.18216).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Ratios beyond exp(+-20) cannot change the loss (they are clipped, or vanish), but inf * 0 would
# make it NaN.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The surrogate loss of some tokens and what happened to them; every field is a scalar tensor
    that adds up over ranks.

    Attributes:
        loss_sum: Negative surrogate summed over the loss tokens; the only field that carries
            gradient.
        num_tokens: Loss tokens.
        num_clipped_low: Tokens with a negative advantage whose ratio is under `1 -
            clip_ratio_low`.
        num_clipped_high: Tokens with a positive advantage whose ratio is over `1 +
            clip_ratio_high`.
        num_dual_clipped: Tokens with a negative advantage whose ratio is over `clip_ratio_c`.
        ratio_sum: Sum of the ratios.
        kl_sum: Sum of the estimate `ratio - 1 - log ratio` of KL(old || new), never negative.
    """

    loss_sum: torch.Tensor
    num_tokens: torch.Tensor
    num_clipped_low: torch.Tensor
    num_clipped_high: torch.Tensor
    num_dual_clipped: torch.Tensor
    ratio_sum: torch.Tensor
    kl_sum: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    importance: torch.Tensor | None = None,
) -> PolicyLoss:
    """Return the token-level clipped surrogate, summed and negated.

    For ratio rho and advantage A of a token: `min(rho A, clip(rho, 1 - low, 1 + high) A)`, and for
    A < 0 not below `c A`. Values where the mask is 0, NaN included, have no influence.
    Where it is not, a log-prob that is not finite makes the loss NaN.

    Args:
        logprobs: `[tokens]`, of the policy that is trained; carries gradient.
        old_logprobs: `[tokens]`, of the policy that sampled.
        advantages: `[tokens]`.
        mask: `[tokens]`, nonzero on response tokens.
        clip_ratio_low: eps_low.
        clip_ratio_high: eps_high.
        clip_ratio_c: Bound of the dual clip, over 1.
        importance: `[tokens]` weights of the tokens' losses; `None` if they are all 1.

    Source: ZPPO, loss.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    keep = mask != 0
    zero = torch.zeros((), dtype=dtype, device=logprobs.device)
    gap = torch.where(keep, logprobs.to(dtype) - old_logprobs.detach().to(dtype), zero)
    # The bound would make a number of an infinite gap, which no log-probs have that can be trained
    # on.
    log_ratio = torch.where(gap.isfinite(), gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), torch.nan)
    advantage = torch.where(keep, advantages.to(dtype), zero)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    surrogate = torch.where(
        advantage < 0, torch.maximum(surrogate, clip_ratio_c * advantage), surrogate
    )
    if importance is not None:
        surrogate = surrogate * torch.where(keep, importance.to(dtype), zero)
    negative, positive = advantage < 0, advantage > 0
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return PolicyLoss(
        loss_sum=-surrogate.sum(),
        num_tokens=keep.sum().to(dtype),
        num_clipped_low=(negative & (ratio < 1 - clip_ratio_low)).sum().to(dtype),
        num_clipped_high=(positive & (ratio > 1 + clip_ratio_high)).sum().to(dtype),
        num_dual_clipped=(negative & (ratio > clip_ratio_c)).sum().to(dtype),
        ratio_sum=torch.where(keep, ratio, zero).sum(),
        kl_sum=torch.where(keep, ratio - 1 - log_ratio, zero).sum(),
    )


def supervised_loss(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood summed over the masked tokens, a scalar.

    Args:
        logprobs: `[tokens]`, of every token given the tokens before it.
        mask: `[tokens]`, nonzero on the tokens to learn.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    return -torch.where(
        mask != 0, logprobs.to(dtype), torch.zeros((), dtype=dtype, device=logprobs.device)
    ).sum()

"""From logits to one token per sequence, by inverting the cumulative distribution at a given
uniform number.
"""

from __future__ import annotations

import torch

from zppo_mm.experience import NO_TOKEN
from zppo_mm.rollout.engine import SamplingParams


def choose_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    params: SamplingParams,
    seen: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per sequence.

    The presence penalty applies to the logits, then temperature, min-p, top-k and top-p in this
    order; top-p counts mass among what is left. The draw takes the first token at which the
    cumulative probability exceeds the uniform number, so it follows from the logits and that number
    alone. Nothing is drawn from a row in which any logit is not finite.

    Args:
        logits: `[batch, vocabulary]` float32, the whole vocabulary.
        uniforms: `[batch]` float64 in [0, 1); not read when greedy.
        params: How tokens are drawn.
        seen: `[batch, vocabulary]` bool, tokens already in the response; needed with a presence
            penalty.
        forbidden: `[tokens]` int64, tokens that are never drawn.

    Returns:
        `[batch]` int64 tokens and `[batch]` float32 log-probs. The log-prob is what the loss
        computes: of the whole, unpenalised distribution at the sampling temperature (at temperature
        1 when greedy). A row from which nothing can be drawn has `NO_TOKEN` and log-prob 0.
    """
    temperature = params.temperature if params.temperature > 0 else 1.0
    # Two of the quickest reductions; a NaN passes through both.
    low, high = logits.amin(-1), logits.amax(-1)
    if temperature != 1.0:
        # Divided as they are, finite logits could overflow.
        logits = (logits - high[:, None]).div_(temperature)
    logprobs = torch.log_softmax(logits, dim=-1)
    scores = logprobs
    if params.presence_penalty:
        assert seen is not None, "a presence penalty needs the tokens seen so far"
        # A constant per row does not matter: the scores are normalised again before the draw.
        scores = logprobs - seen.to(logprobs.dtype) * (params.presence_penalty / temperature)
    if forbidden is not None:
        scores = scores.index_fill(1, forbidden, float("-inf"))
    if params.temperature == 0:
        tokens = scores.argmax(dim=-1)
    elif params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0:
        tokens = _draw_truncated(scores, uniforms, params)
    else:
        # Without what is forbidden, the weights of all others could be too small for their
        # exponentials.
        tokens = _invert(scores.double().sub_(scores.amax(-1, keepdim=True)).exp_(), uniforms)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    sound = low.isfinite() & high.isfinite() & chosen.isfinite()
    return torch.where(sound, tokens, NO_TOKEN), torch.where(sound, chosen, 0.0)


def _draw_truncated(
    scores: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams
) -> torch.Tensor:
    """Draw among the most likely tokens, in descending order."""
    count = scores.shape[1]
    if 0 < params.top_k < count:
        ordered, indices = scores.topk(params.top_k, dim=-1)
    else:
        ordered, indices = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = (ordered - ordered[:, :1]).double().exp()
    # The first is the most likely and 1 here, so min_p is the bound itself.
    probabilities = probabilities * (probabilities >= params.min_p)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities * (before < params.top_p * probabilities.sum(dim=-1, keepdim=True))
    kept[:, 0] = probabilities[:, 0]
    return indices.gather(1, _invert(kept, uniforms)[:, None]).squeeze(1)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the first index at which the running sum exceeds the uniform fraction of the total.

    Sums run in float64: in float32 the rounding over a vocabulary of 248,320 shifts mass between
    tokens.
    """
    cumulative = weights.cumsum(dim=-1)
    target = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp_(max=weights.shape[1] - 1)

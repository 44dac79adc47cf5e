"""From logits to one token per sequence, by inverting the cumulative distribution at a given uniform number."""

from __future__ import annotations

import torch

from zppo_mm.rollout.engine import SamplingParams


def choose_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    params: SamplingParams,
    seen: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per sequence.

    The presence penalty applies to the logits, then temperature, min-p, top-k and top-p in this order; top-p counts mass among what
    is left. The draw takes the first token at which the cumulative probability exceeds the uniform number, so it follows from the
    logits and that number alone.

    Args:
        logits: `[batch, vocabulary]` float32, the whole vocabulary.
        uniforms: `[batch]` float64 in [0, 1); not read when greedy.
        params: How tokens are drawn.
        seen: `[batch, vocabulary]` bool, tokens already in the response; needed with a presence penalty.
        forbidden: `[tokens]` int64, tokens that are never drawn.

    Returns:
        `[batch]` int64 tokens and `[batch]` float32 log-probs. The log-prob is what the loss computes: of the whole,
        unpenalised distribution at the sampling temperature (at temperature 1 when greedy).
    """
    temperature = params.temperature if params.temperature > 0 else 1.0
    logprobs = torch.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=-1)
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
        tokens = _invert(scores.double().exp(), uniforms)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _draw_truncated(scores: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Draw among the most likely tokens, in descending order."""
    count = scores.shape[1]
    if 0 < params.top_k < count:
        ordered, indices = scores.topk(params.top_k, dim=-1)
    else:
        ordered, indices = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = (ordered - ordered[:, :1]).double().exp()
    # The first is the most likely and 1 here, so that min_p is a bound as it stands.
    probabilities = probabilities * (probabilities >= params.min_p)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities * (before < params.top_p * probabilities.sum(dim=-1, keepdim=True))
    kept[:, 0] = probabilities[:, 0]
    return indices.gather(1, _invert(kept, uniforms)[:, None]).squeeze(1)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the first index at which the running sum exceeds the uniform share of the total.

    Sums run in float64: in float32 the rounding over a vocabulary of 248,320 shifts mass between tokens.
    """
    cumulative = weights.cumsum(dim=-1)
    target = uniforms.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp_(max=weights.shape[1] - 1)

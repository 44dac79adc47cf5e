"""From the logits of a micro-batch to the loss to descend, summed over its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from zppo_mm.algorithms.logprobs import TokenStatistics, token_statistics
from zppo_mm.algorithms.losses import policy_loss, supervised_loss
from zppo_mm.config.schema import AlgorithmConfig
from zppo_mm.experience import Microbatch


@dataclass(frozen=True, slots=True)
class ObjectiveTerms:
    """What a micro-batch adds to the update.

    Attributes:
        loss_sum: Scalar with gradient, summed over loss tokens; the update divides it by the global
            token count.
        sums: `[names]` without gradient, one per name of the objective; adds up over micro-batches
            and replicas.
    """

    loss_sum: torch.Tensor
    sums: torch.Tensor


class Objective(Protocol):
    """What is descended. Called on the last pipeline stage, once per micro-batch."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sums; the first two are `loss` and `num_tokens`."""
        ...

    @property
    def needs_advantages(self) -> bool:
        """Whether it looks at advantages and old log-probs; tokens with an advantage of 0 then have
        neither loss nor gradient.
        """
        ...

    @property
    def needs_teacher_top(self) -> bool:
        """Whether samples must carry the teacher's log-probs."""
        ...

    def __call__(self, logits: torch.Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the terms from `[tokens, vocab / tp]` logits, or from the predicting rows
        alone.
        """
        ...


def predicting_rows(microbatch: Microbatch) -> torch.Tensor | None:
    """Return the places whose logits predict the loss tokens, `[loss tokens]`; `None`, for all,
    where there are no loss tokens.

    The logits at place i - 1 predict token i. The first token of a sequence that continues another
    one is predicted by the last of that, which so predicts the first token of each of its children.
    The first token of any other sequence never carries loss, so no prediction crosses into the next
    sequence.
    """
    rows = _predictors(microbatch, microbatch.loss_mask.nonzero().squeeze(-1))
    return rows if len(rows) else None


def _predictors(microbatch: Microbatch, places: torch.Tensor) -> torch.Tensor:
    """Return the places whose logits predict some tokens; a place may come several times."""
    if microbatch.parents is None:
        return places - 1
    parents = torch.tensor(microbatch.parents, device=places.device)
    children = (parents >= 0).nonzero().squeeze(-1)
    bounds = microbatch.cu_seqlens.long()
    before = torch.arange(-1, len(microbatch.token_ids) - 1, device=places.device)
    before[bounds[children]] = bounds[parents[children] + 1] - 1
    return before[places]


def with_loss_predicted_by(microbatch: Microbatch, tokens: slice) -> Microbatch:
    """Return the micro-batch with loss on those tokens alone that some of its places predict.

    Context ranks so divide the loss: each counts what the logits of its own part predict, the first
    token of the next part among it.

    Args:
        microbatch: The packed sequences.
        tokens: The places whose logits are at hand.
    """
    if tokens == slice(0, len(microbatch.token_ids)):
        return microbatch
    places = microbatch.loss_mask.nonzero().squeeze(-1)
    rows = _predictors(microbatch, places)
    loss_mask = microbatch.loss_mask.clone()
    loss_mask[places[(rows < tokens.start) | (rows >= tokens.stop)]] = 0
    return replace(microbatch, loss_mask=loss_mask)


def predicting_logits(
    logits: torch.Tensor, microbatch: Microbatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of the loss tokens, `[loss tokens]`, and the logits that predict them,
    `[loss tokens, vocab / tp]`.

    Args:
        logits: `[tokens, vocab / tp]`, or `[loss tokens, vocab / tp]` of the predicting rows alone;
            of any tokens where none has loss.
        microbatch: The packed sequences they were computed from.
    """
    places = microbatch.loss_mask.nonzero().squeeze(-1)
    if not len(places):
        logits = logits[:0]
    # The first token carries no loss: there are always fewer predicting rows than tokens.
    elif len(logits) == len(microbatch.token_ids):
        logits = logits.index_select(0, _predictors(microbatch, places))
    assert len(logits) == len(places), "logits of all tokens or of the predicting rows"
    return places, logits


def loss_token_statistics(
    logits: torch.Tensor,
    microbatch: Microbatch,
    group: dist.ProcessGroup | None,
    temperature: float,
) -> tuple[torch.Tensor, TokenStatistics]:
    """Return the places of the loss tokens, `[loss tokens]`, and their log-probs and entropies.

    Args:
        logits: As in `predicting_logits`.
        microbatch: The packed sequences they were computed from.
        group: Ranks that share the vocabulary.
        temperature: Of the log-probs.
    """
    places, logits = predicting_logits(logits, microbatch)
    rows = torch.arange(len(places), device=places.device)
    return places, token_statistics(logits, rows, microbatch.token_ids[places], group, temperature)


class PolicyObjective:
    """The clipped surrogate on sampled responses."""

    names = (
        "loss",
        "num_tokens",
        "clip_fraction_low",
        "clip_fraction_high",
        "clip_fraction_dual",
        "ratio",
        "kl",
        "entropy",
        "importance",
    )
    needs_advantages = True
    needs_teacher_top = False

    def __init__(
        self, config: AlgorithmConfig, temperature: float, group: dist.ProcessGroup | None = None
    ) -> None:
        """Keep the clip ranges.

        Args:
            config: Clip ranges of the surrogate.
            temperature: Of the rollouts.
            group: Ranks that share the vocabulary.
        """
        self._config = config
        self._temperature = temperature
        self._group = group

    def __call__(self, logits: torch.Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the negative surrogate and how far the policy has moved from the one that
        sampled.
        """
        assert microbatch.unknown is None, (
            "old log-probs that are not known are computed before the update"
        )
        places, statistics = loss_token_statistics(
            logits, microbatch, self._group, self._temperature
        )
        importance = microbatch.importance[places] if microbatch.importance is not None else None
        terms = policy_loss(
            statistics.logprobs,
            microbatch.old_logprobs[places],
            microbatch.advantages[places],
            microbatch.loss_mask[places],
            self._config.clip_ratio_low,
            self._config.clip_ratio_high,
            self._config.clip_ratio_c,
            importance,
        )
        values = (
            terms.loss_sum,
            terms.num_tokens,
            terms.num_clipped_low,
            terms.num_clipped_high,
            terms.num_dual_clipped,
            terms.ratio_sum,
            terms.kl_sum,
            statistics.entropies.sum(),
            importance.sum() if importance is not None else terms.num_tokens,
        )
        return ObjectiveTerms(
            terms.loss_sum, torch.stack([value.detach().double() for value in values])
        )


class SupervisedObjective:
    """Plain cross-entropy on the tokens that the mask names."""

    names = ("loss", "num_tokens", "entropy")
    needs_advantages = False
    needs_teacher_top = False

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Keep the ranks that share the vocabulary."""
        self._group = group

    def __call__(self, logits: torch.Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the negative log-likelihood."""
        places, statistics = loss_token_statistics(logits, microbatch, self._group, temperature=1.0)
        loss = supervised_loss(statistics.logprobs, microbatch.loss_mask[places])
        count = torch.tensor(float(len(places)), device=loss.device)
        return ObjectiveTerms(
            loss,
            torch.stack(
                [value.detach().double() for value in (loss, count, statistics.entropies.sum())]
            ),
        )

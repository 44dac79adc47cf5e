"""Training objectives: from the logits of a micro-batch to its loss, summed over tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from zppo_mm.algorithms.logprobs import TokenStatistics, token_statistics
from zppo_mm.algorithms.losses import policy_loss, supervised_loss
from zppo_mm.config.schema import AlgorithmConfig
from zppo_mm.experience import Microbatch
from zppo_mm.observability.metrics import Mean


@dataclass(frozen=True, slots=True)
class PerLossToken:
    """A metric that is averaged over all loss tokens of an update, then over the updates alike.

    Tokens of trivial groups count, although they skip the forward pass: they add 0.
    """

    name: str

    def mean(self, total: float, num_loss_tokens: int, num_forward_tokens: float) -> Mean:
        """Return the mean of one update from the sum over its tokens."""
        return Mean(total / max(num_loss_tokens, 1))


@dataclass(frozen=True, slots=True)
class PerForwardToken:
    """A metric that is averaged over the loss tokens that went through the network, of all updates
    together. An update of trivial groups alone has no value.
    """

    name: str

    def mean(self, total: float, num_loss_tokens: int, num_forward_tokens: float) -> Mean:
        """Return the mean of one update from the sum over its tokens."""
        return Mean(total, num_forward_tokens)


@dataclass(frozen=True, slots=True)
class ObjectiveTerms:
    """What a micro-batch adds to the update.

    Attributes:
        loss_sum: Scalar with gradient, summed over loss tokens; the update divides it by the global
            denominator.
        sums: `[2 + metrics]` without gradient: the loss, the loss tokens that went through the
            network, and one sum per metric of the objective. Adds up over micro-batches and
            replicas.
    """

    loss_sum: torch.Tensor
    sums: torch.Tensor


class Objective(Protocol):
    """The training objective. Called on the last pipeline stage, once per micro-batch."""

    @property
    def metrics(self) -> tuple[PerLossToken | PerForwardToken, ...]:
        """What the sums behind the first two are, and how each is averaged."""
        ...

    @property
    def needs_advantages(self) -> bool:
        """Whether it uses advantages and old log-probs; tokens with an advantage of 0 then have
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
    """Return the indices whose logits predict the loss tokens, `[loss tokens]`; `None`, for all,
    where there are no loss tokens.

    The logits at index i - 1 predict token i. The first token of a sequence that continues another
    one is predicted by the last of that, which so predicts the first token of each of its children.
    The first token of any other sequence never carries loss, so no prediction crosses into the next
    sequence.
    """
    rows = _predictors(microbatch, microbatch.loss_mask.nonzero().squeeze(-1))
    return rows if len(rows) else None


def _predictors(microbatch: Microbatch, indices: torch.Tensor) -> torch.Tensor:
    """Return the indices whose logits predict some tokens; an index may come several times."""
    if microbatch.parents is None:
        return indices - 1
    parents = torch.tensor(microbatch.parents, device=indices.device)
    children = (parents >= 0).nonzero().squeeze(-1)
    bounds = microbatch.cu_seqlens.long()
    before = torch.arange(-1, len(microbatch.token_ids) - 1, device=indices.device)
    before[bounds[children]] = bounds[parents[children] + 1] - 1
    return before[indices]


def with_loss_predicted_by(microbatch: Microbatch, tokens: slice) -> Microbatch:
    """Return the micro-batch with loss on those tokens alone that some of its logits predict.

    So context ranks divide the loss: each counts the tokens that its own logits predict, the first
    token of the next rank's part among them.

    Args:
        microbatch: The packed sequences.
        tokens: The indices whose logits this rank has.
    """
    if tokens == slice(0, len(microbatch.token_ids)):
        return microbatch
    indices = microbatch.loss_mask.nonzero().squeeze(-1)
    rows = _predictors(microbatch, indices)
    loss_mask = microbatch.loss_mask.clone()
    loss_mask[indices[(rows < tokens.start) | (rows >= tokens.stop)]] = 0
    return replace(microbatch, loss_mask=loss_mask)


def predicting_logits(
    logits: torch.Tensor, microbatch: Microbatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the loss tokens, `[loss tokens]`, and the logits that predict them,
    `[loss tokens, vocab / tp]`.

    Args:
        logits: `[tokens, vocab / tp]`, or `[loss tokens, vocab / tp]` of the predicting rows alone;
            of any tokens where none has loss.
        microbatch: The packed sequences they were computed from.
    """
    indices = microbatch.loss_mask.nonzero().squeeze(-1)
    if not len(indices):
        logits = logits[:0]
    # The first token carries no loss: there are always fewer predicting rows than tokens.
    elif len(logits) == len(microbatch.token_ids):
        logits = logits.index_select(0, _predictors(microbatch, indices))
    assert len(logits) == len(indices), "logits of all tokens or of the predicting rows"
    return indices, logits


def loss_token_statistics(
    logits: torch.Tensor,
    microbatch: Microbatch,
    group: dist.ProcessGroup | None,
    temperature: float,
) -> tuple[torch.Tensor, TokenStatistics]:
    """Return the indices of the loss tokens, `[loss tokens]`, and their log-probs and entropies.

    Args:
        logits: As in `predicting_logits`.
        microbatch: The packed sequences they were computed from.
        group: Ranks that share the vocabulary.
        temperature: Of the log-probs.
    """
    indices, logits = predicting_logits(logits, microbatch)
    rows = torch.arange(len(indices), device=indices.device)
    return indices, token_statistics(
        logits, rows, microbatch.token_ids[indices], group, temperature
    )


class PolicyObjective:
    """The clipped surrogate on sampled responses."""

    metrics = (
        PerLossToken("policy/clip_low"),
        PerLossToken("policy/clip_high"),
        PerLossToken("policy/clip_dual"),
        PerForwardToken("policy/ratio"),
        PerForwardToken("policy/kl_old"),
        PerForwardToken("policy/entropy"),
        PerForwardToken("policy/importance"),
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
        indices, statistics = loss_token_statistics(
            logits, microbatch, self._group, self._temperature
        )
        importance = microbatch.importance[indices] if microbatch.importance is not None else None
        terms = policy_loss(
            statistics.logprobs,
            microbatch.old_logprobs[indices],
            microbatch.advantages[indices],
            microbatch.loss_mask[indices],
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

    metrics = (PerForwardToken("policy/entropy"),)
    needs_advantages = False
    needs_teacher_top = False

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Keep the ranks that share the vocabulary."""
        self._group = group

    def __call__(self, logits: torch.Tensor, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the negative log-likelihood."""
        indices, statistics = loss_token_statistics(
            logits, microbatch, self._group, temperature=1.0
        )
        loss = supervised_loss(statistics.logprobs, microbatch.loss_mask[indices])
        count = torch.tensor(float(len(indices)), device=loss.device)
        return ObjectiveTerms(
            loss,
            torch.stack(
                [value.detach().double() for value in (loss, count, statistics.entropies.sum())]
            ),
        )

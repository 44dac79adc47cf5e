"""Training objectives: from the output of a micro-batch to its loss, summed over tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from zppo_mm.algorithms.logprobs import token_statistics
from zppo_mm.algorithms.losses import policy_loss, supervised_loss
from zppo_mm.algorithms.row_loss import OutputRows
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

    def __call__(self, rows: OutputRows, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the terms from the rows of all tokens, or of the predicting ones alone."""
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


def predicting_hidden(model: Any, microbatch: Microbatch) -> torch.Tensor:
    """Pass a micro-batch through a rank's stage of a network, for the rows that predict a loss
    token; see `VisionLanguageModel.forward`.
    """
    tokens = (microbatch.token_ids, microbatch.positions, microbatch.cu_seqlens)
    media = (microbatch.patches, microbatch.grids)
    wanted = {"rows": predicting_rows(microbatch), "parents": microbatch.parents}
    hidden: torch.Tensor = model(*tokens, *media, **wanted, output_layer=False)
    return hidden


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


def loss_rows(rows: OutputRows, microbatch: Microbatch) -> tuple[torch.Tensor, OutputRows]:
    """Return the indices of the loss tokens, `[loss tokens]`, and the rows that predict them.

    Args:
        rows: Of all tokens, or of the predicting ones alone; of any where none has loss.
        microbatch: The packed sequences they were computed from.
    """
    indices = microbatch.loss_mask.nonzero().squeeze(-1)
    if not len(indices):
        rows = rows.select(slice(0, 0))
    # The first token carries no loss: there are always fewer predicting rows than tokens.
    elif len(rows) == len(microbatch.token_ids):
        rows = rows.select(_predictors(microbatch, indices))
    assert len(rows) == len(indices), "rows of all tokens or of the predicting ones"
    return indices, rows


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

    def __call__(self, rows: OutputRows, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the negative surrogate and how far the policy has moved from the one that
        sampled.
        """
        assert microbatch.unknown is None, (
            "old log-probs that are not known are computed before the update"
        )
        indices, rows = loss_rows(rows, microbatch)

        def terms(logits: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = indices[chunk]
            statistics = token_statistics(
                logits, microbatch.token_ids[tokens], self._group, self._temperature
            )
            weights = microbatch.importance
            importance = weights[tokens] if weights is not None else None
            found = policy_loss(
                statistics.logprobs,
                microbatch.old_logprobs[tokens],
                microbatch.advantages[tokens],
                microbatch.loss_mask[tokens],
                self._config.clip_ratio_low,
                self._config.clip_ratio_high,
                self._config.clip_ratio_c,
                importance,
            )
            values = (
                found.loss_sum,
                found.num_tokens,
                found.num_clipped_low,
                found.num_clipped_high,
                found.num_dual_clipped,
                found.ratio_sum,
                found.kl_sum,
                statistics.entropies.sum(),
                importance.sum() if importance is not None else found.num_tokens,
            )
            return found.loss_sum, stacked(values)

        return ObjectiveTerms(*rows.sum(terms))


class SupervisedObjective:
    """Plain cross-entropy on the tokens that the mask names."""

    metrics = (PerForwardToken("policy/entropy"),)
    needs_advantages = False
    needs_teacher_top = False

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Keep the ranks that share the vocabulary."""
        self._group = group

    def __call__(self, rows: OutputRows, microbatch: Microbatch) -> ObjectiveTerms:
        """Return the negative log-likelihood."""
        indices, rows = loss_rows(rows, microbatch)
        targets, mask = microbatch.token_ids[indices], microbatch.loss_mask[indices]

        def terms(logits: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            statistics = token_statistics(logits, targets[chunk], self._group)
            loss = supervised_loss(statistics.logprobs, mask[chunk])
            values = (loss, mask[chunk].sum(), statistics.entropies.sum())
            return loss, stacked(values)

        return ObjectiveTerms(*rows.sum(terms))


def stacked(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sums of a chunk as one float64 tensor without gradient."""
    return torch.stack([value.detach().double() for value in values])

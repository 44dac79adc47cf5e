"""The student as something to train: one optimizer step per mini-batch, on any layout."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from zppo_mm.algorithms.logprobs import token_statistics
from zppo_mm.algorithms.row_loss import OutputRows
from zppo_mm.config.schema import ParallelConfig, TrainConfig
from zppo_mm.errors import ConfigError, NotFiniteError
from zppo_mm.experience import Batch, Microbatch
from zppo_mm.models.provider import freeze_parts
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.observability.metrics import Mean
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.objective import (
    Objective,
    ObjectiveTerms,
    loss_rows,
    predicting_hidden,
    with_loss_predicted_by,
)
from zppo_mm.training.optimizer import (
    build_optimizer,
    build_scheduler,
    clip_and_step,
    gradient_norm,
    wrap_model,
)
from zppo_mm.training.optimizer_offload import OptimizerOffload

logger = logging.getLogger(__name__)
MAX_UIDS_NAMED = 8
MAX_SKIPPED_IN_A_ROW = 4
"""Updates that may be skipped one after the other: data can spoil single ones, but so many are the
network's fault.
"""


@dataclass(frozen=True, slots=True)
class UpdateMetrics:
    """One gradient update.

    Attributes:
        loss: Mean over the mini-batch, weighted as its tokens are.
        grad_norm: Before clipping.
        learning_rate: Of this update.
        num_loss_tokens: Of the mini-batch.
        num_forward_tokens: Loss tokens that went through the network; those of trivial groups did
            not.
        means: The objective's metrics by name.
        skipped: Whether the weights were left alone because loss, gradient or another sum was not
            finite.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_loss_tokens: int
    num_forward_tokens: int
    means: dict[str, Mean]
    skipped: bool


@dataclass(frozen=True, slots=True)
class TrainMetrics:
    """All updates of a step; the means leave out skipped updates and weigh the others alike."""

    updates: tuple[UpdateMetrics, ...]

    @property
    def num_skipped_updates(self) -> int:
        """Updates whose loss or gradient was not finite."""
        return sum(update.skipped for update in self.updates)

    @property
    def loss(self) -> float:
        """Mean loss."""
        return _mean([update.loss for update in self.updates if not update.skipped])

    @property
    def grad_norm(self) -> float:
        """Mean gradient norm before clipping."""
        return _mean([update.grad_norm for update in self.updates if not update.skipped])

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last update."""
        return self.updates[-1].learning_rate if self.updates else math.nan


class Policy:
    """The student with its gradient buffers, optimizer and schedule. Every rank of the run calls
    its methods together.

    Attributes:
        model: This rank's stage.
        objective: The training objective.
        shares_prompts: Whether micro-batches use shared-prefix training.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        train: TrainConfig,
        layout: ParallelConfig,
        objective: Objective,
    ) -> None:
        """Freeze what is not trained, wrap the model and build the optimizer.

        Args:
            model: This rank's stage, weights loaded.
            train: Optimizer and schedule.
            layout: The one the process groups were made for.
            objective: The training objective.

        Raises:
            ConfigError: `train.freeze` names an unknown part or leaves nothing, or prompts are to
                be shared where they cannot.
        """
        self.shares_prompts = _shares_prompts(model, train)
        freeze_parts(model, train.freeze)
        self.model = model
        self.objective = objective
        self._denominator = 1.0
        self._skipped_in_a_row = 0
        self._config: Any = model.config
        _keep_replicated_gradients_equal(model)
        self._wrapped = wrap_model(model, layout)
        self._config.finalize_model_grads_func = self._finalize_gradients
        if layout.overlap_grad_reduce:
            self._config.no_sync_func = self._wrapped.no_sync
        self.optimizer = build_optimizer(self._wrapped, train, layout, self._config.params_dtype)
        self.scheduler = build_scheduler(self.optimizer, train)
        self._offload = (
            OptimizerOffload(self._wrapped, self.optimizer) if layout.offload_optimizer else None
        )
        model.train()

    def optimizer_on_device(self) -> AbstractContextManager[None]:
        """Return a block that has the optimizer state and the gradient buffers on the device, where
        they are offloaded outside of it.
        """
        return self._offload.on_device() if self._offload is not None else nullcontext()

    def train_step(self, batches: Sequence[Batch]) -> TrainMetrics:
        """Make one update per batch, in order.

        Loss and gradient are weighted sums over all loss tokens of the update divided by the sum of
        the weights, so they depend neither on the layout nor on how micro-batches are cut.

        Raises:
            NotFiniteError: On every rank: `MAX_SKIPPED_IN_A_ROW` updates in a row, of this step or
                of those before, had to be skipped.
        """
        with self.optimizer_on_device():
            return TrainMetrics(tuple([self._update(batch) for batch in batches]))

    def _update(self, batch: Batch) -> UpdateMetrics:
        self._wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._denominator = batch.denominator
        results = self._forward_backward(batch.microbatches, self._loss, forward_only=False)
        norm = gradient_norm(self.optimizer)
        sums, finite = self._reduce([terms.sums for terms, _ in results], norm)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if finite:
            clip_and_step(self.optimizer, norm)
            self.scheduler.step(increment=1)
            self._skipped_in_a_row = 0
        else:
            self._report_skip(results)
            self._count_skip()
        return _update_metrics(self.objective, sums, batch, norm, learning_rate, not finite)

    def _forward_backward(
        self, microbatches: Sequence[Microbatch], collect: Any, forward_only: bool
    ) -> list[Any]:
        """Pass micro-batches through Megatron's pipeline schedule; returns what `collect` gave per
        micro-batch on the last stage.
        """

        def forward(iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Any]:
            microbatch = next(iterator)
            microbatch = with_loss_predicted_by(
                microbatch, self.model.own_tokens(len(microbatch.token_ids))
            )
            return predicting_hidden(model, microbatch), partial(collect, microbatch)

        return cast(
            "list[Any]",
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(microbatches),
                model=[self._wrapped],
                num_microbatches=len(microbatches),
                # Unused: stages send each other the length of every micro-batch.
                seq_length=1,
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            ),
        )

    def _loss(
        self, microbatch: Microbatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        terms = self.objective(OutputRows(hidden, self.model.output_weight()), microbatch)
        # The schedule only adds up this count; the denominator is the batch's.
        uncounted = torch.zeros((), dtype=torch.int, device=hidden.device)
        return (
            terms.loss_sum,
            uncounted,
            (ObjectiveTerms(terms.loss_sum.detach(), terms.sums), microbatch.uids),
        )

    def _finalize_gradients(
        self, model: list[Any], num_tokens: torch.Tensor | None, **groups: Any
    ) -> None:
        """Finish the reductions over replicas, tied stages and tensor ranks, then divide by the one
        global denominator.
        """
        finalize_model_grads(model, None, **groups)
        if parallel.tensor_size() > 1:
            for parameter in self.model.parameters():
                if parameter.requires_grad and getattr(parameter, "sum_gradients_across_tp", False):
                    dist.all_reduce(cast(Any, parameter).main_grad, group=parallel.tensor_group())
        for chunk in model:
            chunk.scale_gradients(1.0 / self._denominator)

    def _reduce(self, sums: list[torch.Tensor], norm: float) -> tuple[list[float], bool]:
        """Add up the sums of all micro-batches and replicas, for every rank; and agree on whether
        the gradient is finite.
        """
        total = torch.zeros(
            3 + len(self.objective.metrics), dtype=torch.float64, device=parallel.device()
        )
        if sums and parallel.is_replica_leader():
            total[1:] = torch.stack(sums).sum(0)
        total[0] = 0.0 if math.isfinite(norm) else 1.0
        dist.all_reduce(total)
        values = total.tolist()
        return values[1:], values[0] == 0.0 and all(map(math.isfinite, values))

    def _report_skip(self, results: list[tuple[ObjectiveTerms, tuple[str, ...]]]) -> None:
        """Log which groups had a loss that is not finite; all groups of the update if none had."""
        suspects = [uids for terms, uids in results if not bool(torch.isfinite(terms.loss_sum))]
        # Context ranks have the same groups.
        found = (
            parallel.gather_from_replicas(suspects),
            parallel.gather_from_replicas([uids for _, uids in results]),
        )
        broken, present = (
            list(dict.fromkeys(uid for replica in every for uids in replica for uid in uids))
            for every in found
        )
        if parallel.rank() == 0:
            named, what = (
                (broken, "their loss")
                if broken
                else (present, "the gradient of the update they are in")
            )
            names = ", ".join(named[:MAX_UIDS_NAMED]) + (
                f" and {len(named) - MAX_UIDS_NAMED} more" if len(named) > MAX_UIDS_NAMED else ""
            )
            logger.warning(
                "training.policy: the update was skipped, %s is not finite: groups %s", what, names
            )

    def _count_skip(self) -> None:
        """End the run where nothing can be learned any more; every rank has skipped the same
        updates.
        """
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NotFiniteError(
                f"training.policy: {self._skipped_in_a_row} updates in a row were skipped, got "
                "losses or gradients that are not finite, expected finite ones; start again from "
                "an earlier checkpoint with a lower train.lr or train.clip_grad, or check the "
                "weights of the folder that the model came from; the warnings before name the "
                "groups"
            )

    @torch.no_grad()
    def compute_logprobs(self, batch: Batch, temperature: float = 1.0) -> list[torch.Tensor]:
        """Return the log-probs of the loss tokens from the training forward pass, without the
        dropout of adapters.

        Args:
            batch: This rank's micro-batches.
            temperature: Of the rollouts.

        Returns:
            Per micro-batch of this replica, on all its ranks: `[tokens]` float32, 0 where the loss
            mask is 0.
        """

        def collect(
            microbatch: Microbatch, hidden: torch.Tensor, non_loss_data: bool = True
        ) -> torch.Tensor:
            indices, rows = loss_rows(OutputRows(hidden, self.model.output_weight()), microbatch)
            result = torch.zeros_like(microbatch.old_logprobs)
            for chunk in rows.chunks():
                targets = microbatch.token_ids[indices[chunk]]
                result[indices[chunk]] = token_statistics(
                    rows.logits(chunk), targets, parallel.tensor_group(), temperature
                ).logprobs
            return result

        self.model.eval()
        results = self._forward_backward(batch.microbatches, collect, forward_only=True)
        self.model.train()
        if parallel.context_size() > 1:
            # Each has the log-probs that its own part predicts, and zeros elsewhere.
            for result in results:
                dist.all_reduce(result, group=parallel.context_group())
        if parallel.pipeline_size() == 1:
            return results
        # Objects, because the other stages do not know the lengths.
        sent = [[result.cpu() for result in results]]
        group = parallel.pipeline_group()
        dist.broadcast_object_list(sent, src=dist.get_process_group_ranks(group)[-1], group=group)
        return [result.to(parallel.device()) for result in sent[0]]


def _shares_prompts(model: VisionLanguageModel, train: TrainConfig) -> bool:
    """Return whether prompts are shared by the responses of a micro-batch."""
    if train.share_prompts == "always" and not model.shares_prompts:
        raise ConfigError(
            "train.share_prompts: this network cannot share prompts, got 'always' with "
            "flash-linear-attention's kernels, expected 'auto' or 'never' with those; change it, "
            "or uninstall flash-linear-attention and fla-core"
        )
    return model.shares_prompts and train.share_prompts != "never"


def _keep_replicated_gradients_equal(model: VisionLanguageModel) -> None:
    """Have Megatron average the tower's gradients over the tensor ranks that each compute all of
    it.

    They are equal but for the order in which a GPU adds; averaged, the copies can never drift
    apart.
    """
    for part in ("vision", "projector"):
        for parameter in model.parameters_of(part):
            cast(Any, parameter).average_gradients_across_tp_domain = True


def _update_metrics(
    objective: Objective,
    sums: list[float],
    batch: Batch,
    norm: float,
    learning_rate: float,
    skipped: bool,
) -> UpdateMetrics:
    loss, num_forward_tokens, *totals = sums
    return UpdateMetrics(
        loss=loss / batch.denominator,
        grad_norm=norm,
        learning_rate=learning_rate,
        num_loss_tokens=batch.num_loss_tokens,
        num_forward_tokens=int(num_forward_tokens) if math.isfinite(num_forward_tokens) else 0,
        means={
            metric.name: metric.mean(total, batch.num_loss_tokens, num_forward_tokens)
            for metric, total in zip(objective.metrics, totals, strict=True)
        },
        skipped=skipped,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan

"""A loss that is a sum over rows of logits, and its gradient, chunk by chunk from the hidden
states: logits of all rows never exist together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.nn.functional import linear

from zppo_mm.algorithms.logprobs import row_chunks

MAX_CHUNK_LOGITS = 1 << 26
"""Logits of a chunk at most, 256 MiB in float32: enough rows for an efficient matrix product."""

RowLoss: TypeAlias = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""From the logits `[chunk, vocab / tp]` float32 of some rows, and which rows those are, to their
scalar loss and to further sums without gradient. Both add up over chunks.
"""


def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return float32 logits `[rows, vocab / tp]` of hidden states `[rows, hidden]`."""
    return linear(hidden, weight).float()


def chunks_of(num_rows: int, weight: torch.Tensor, max_logits: int) -> list[slice]:
    """Return the chunks of the rows; one empty chunk where there are none."""
    return row_chunks(num_rows, max(1, max_logits // len(weight))) or [slice(0, 0)]


def sum_over_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    row_loss: RowLoss,
    max_logits: int = MAX_CHUNK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of all rows, with gradient to hidden states and weight, and the sums.

    The gradient is computed in the forward pass, while a chunk's logits are there, so the output
    layer costs no second matrix product. Beside a chunk's logits and their gradient this takes
    the gradients of `hidden` and, in float32, of `weight`.

    Args:
        hidden: `[rows, hidden]`, normalised; ranks that share the vocabulary hold the same rows,
            and sum their gradients.
        weight: `[vocab / tp, hidden]`, this rank's slice of the output layer.
        row_loss: The loss; called at least once, with collectives in the same order on all ranks
            of the vocabulary.
        max_logits: Logits of a chunk at most.

    Source: Liger kernel's fused linear losses (Hsu et al., 2024, arXiv 2410.10989).
    """
    return _SumOverRows.apply(hidden, weight, row_loss, max_logits)  # type: ignore[no-untyped-call]


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        row_loss: RowLoss,
        max_logits: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses, sums = [], []
        for chunk in chunks_of(len(hidden), weight, max_logits):
            rows = hidden[chunk]
            logits = logits_of(rows, weight).requires_grad_(wants_hidden or wants_weight)
            with torch.set_grad_enabled(logits.requires_grad):
                loss, further = row_loss(logits, chunk)
            losses.append(loss.detach())
            sums.append(further)
            if not logits.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(loss, logits)
            gradient = gradient.to(weight.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                weight_gradient += gradient.T @ rows
        total = torch.stack(sums).sum(0)
        # Cast at once: what is kept until the backward pass is no larger than the weight.
        ctx.save_for_backward(
            hidden_gradient,
            weight_gradient.to(weight.dtype) if weight_gradient is not None else None,
        )
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(0), total

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor, *_unused: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        gradients = (
            None if kept is None else kept * upstream.to(kept.dtype) for kept in ctx.saved_tensors
        )
        return (*gradients, None, None)

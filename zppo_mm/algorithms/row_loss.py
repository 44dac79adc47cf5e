"""Logits of many rows, chunk by chunk from their hidden states: those of all rows never exist
together, neither for a loss nor for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch.nn.functional import linear

from zppo_mm.algorithms.logprobs import row_chunks

MAX_CHUNK_LOGITS_CPU = 1 << 25
MAX_CHUNK_LOGITS_GPU = 1 << 27
"""Logits of a chunk at most, 512 MiB in float32 on a GPU; 540 rows of Qwen3.5's vocabulary. With
every chunk, the gradient of the weight is read and written once.
"""
MAX_PRODUCT_ELEMENTS_CPU = 1 << 19
"""Elements of a product that is cast and added on a CPU at most, 1 MiB in bfloat16: it is read back
from the cache.
"""

RowLoss: TypeAlias = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""From the logits `[chunk, vocab / tp]` float32 of some rows, and which rows those are, to their
scalar loss and to further sums without gradient. Both add up over chunks. Ranks that share the
vocabulary call it for the same chunks in the same order, so it may use collectives.
"""


@dataclass(frozen=True, slots=True)
class OutputRows:
    """The last hidden states of some tokens, and the output layer.

    Attributes:
        hidden: `[rows, hidden]`, normalised. Ranks that share the vocabulary hold the same rows and
            sum their gradients in the backward pass.
        weight: `[vocab / tp, hidden]`, this rank's slice of the vocabulary.
        max_chunk_logits: Bounds the rows of a chunk; 0 for what suits the device.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    max_chunk_logits: int = 0

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, rows: torch.Tensor | slice) -> OutputRows:
        """Return some of the rows, in any order and number."""
        return replace(self, hidden=self.hidden[rows])

    def logits(self, rows: slice) -> torch.Tensor:
        """Return float32 logits `[rows, vocab / tp]` of a chunk."""
        return linear(self.hidden[rows], self.weight).float()

    def chunks(self) -> list[slice]:
        """Return slices that cover all rows; an empty one if there are none."""
        default = MAX_CHUNK_LOGITS_CPU if self.hidden.is_cpu else MAX_CHUNK_LOGITS_GPU
        size = max(1, (self.max_chunk_logits or default) // len(self.weight))
        return row_chunks(len(self), size) or [slice(0, 0)]

    def sum(self, row_loss: RowLoss) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of all rows, with gradient to hidden states and weight, and the sums.

        The gradient is computed in the forward pass, while a chunk's logits are there, so the
        backward pass needs no second product with the weight. Beside a few chunks of logits this
        takes one gradient of `hidden` and one of `weight`, the latter in float32.

        Source: fused linear losses of the Liger kernels (Hsu et al., 2024, arXiv 2410.10989).
        """
        return cast(
            "tuple[torch.Tensor, torch.Tensor]",
            _Sum.apply(self.hidden, self.weight, self, row_loss),  # type: ignore[no-untyped-call]
        )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, rows: OutputRows, row_loss: RowLoss
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses, sums = [], []
        for chunk in rows.chunks():
            logits = rows.logits(chunk).requires_grad_(wants_hidden or wants_weight)
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
                _add_product(weight_gradient, gradient, hidden[chunk])
        # Cast at once: what is kept until the backward pass is as large as the weight.
        kept = weight_gradient.to(weight.dtype) if weight_gradient is not None else None
        ctx.save_for_backward(hidden_gradient, kept)
        total = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(0), total

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor, *_unused: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight = (
            None if kept is None else kept.mul_(upstream.to(kept.dtype))
            for kept in ctx.saved_tensors
        )
        return hidden, weight, None, None


def _add_product(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add `gradient.T @ hidden` to a float32 `total`, which is as large as the weight: nothing else
    of that size is made.
    """
    if hidden.dtype == total.dtype:
        # In one call: a product that is added apart takes two more passes over a gradient as large
        # as the weight, a fifth of the time on a CPU.
        total.addmm_(gradient.T, hidden)
        return
    if not total.is_cpu:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)
        return
    for part in row_chunks(len(total), max(1, MAX_PRODUCT_ELEMENTS_CPU // hidden.shape[1])):
        total[part] += gradient[:, part].T @ hidden

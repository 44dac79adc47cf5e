"""Log-probabilities and entropies of tokens from logits whose vocabulary is split over
tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MAX_CHUNK_ROWS = 256
MAX_CHUNK_LOGITS_CPU = 1 << 21
"""Logits of a chunk at most on a CPU, 8 MiB in float32: from 32 MiB on glibc gives every tensor new
pages, which take as long to clear as the softmax.
"""
NO_WEIGHT = -1e4
"""Bound of log-weights from below: its exponential is 0 in float32, and 0 times it is 0."""


class TokenStatistics(NamedTuple):
    """Log-probs and entropies of tokens, both `[rows]` float32 with gradient; in nats."""

    logprobs: torch.Tensor
    entropies: torch.Tensor


def token_statistics(
    logits: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> TokenStatistics:
    """Return the log-prob of a target and the entropy of every row of the logits, without ever
    gathering the vocabulary.

    Two all-reduces, of one and of three numbers per row. Work memory is a few chunks of
    `[chunk_rows, vocab / tp]` in float32; the backward pass computes the softmax again instead of
    keeping it.

    Args:
        logits: `[rows, vocab / tp]`, this rank's slice of the vocabulary; left unchanged.
        targets: `[rows]` int64, ids over the whole vocabulary.
        group: Ranks that share the vocabulary, in its order; `None` if it is whole.
        temperature: Divides the logits.
        chunk_rows: Rows handled at a time; by default what is quick on this device.

    Raises:
        ValueError: The temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(
            f"token_statistics: a log-prob needs a temperature above 0, got {temperature}; sample "
            "greedily only where nothing is trained"
        )
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    statistics = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        logits, targets, group, temperature, chunk_rows or _chunk_rows(logits)
    )
    return TokenStatistics(*statistics)


def _chunk_rows(logits: torch.Tensor) -> int:
    if logits.device.type != "cpu":
        return MAX_CHUNK_ROWS
    return max(1, min(MAX_CHUNK_ROWS, MAX_CHUNK_LOGITS_CPU // logits.shape[1]))


class _TokenStatistics(torch.autograd.Function):
    """With z the scaled logits, Z = sum exp z and p = exp(z - log Z):

    log-prob = z_target - log Z, entropy = log Z - sum p z;
    d log-prob / dz = 1[target] - p, d entropy / dz = -p (log p + entropy).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local = _local_targets(targets, logits.shape[1], group)
        largest = logits.new_empty(len(logits), dtype=torch.float32)
        if group is not None:
            for chunk in row_chunks(len(logits), chunk_rows):
                largest[chunk] = logits[chunk].amax(-1).float() / temperature
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        sums = logits.new_zeros((3, len(logits)), dtype=torch.float32)
        for chunk in row_chunks(len(logits), chunk_rows):
            shifted = _scaled(logits[chunk], temperature)
            if group is None:
                largest[chunk] = shifted.amax(-1)
            shifted.sub_(largest[chunk, None])
            mine, index = local.mine[chunk], local.columns[chunk]
            sums[2, chunk] = torch.where(mine, shifted.gather(-1, index[:, None]).squeeze(-1), 0.0)
            # A logit of -inf has weight 0 and must add 0, not 0 * -inf.
            weights = shifted.clamp_(min=NO_WEIGHT).exp()
            sums[0, chunk] = weights.sum(-1)
            sums[1, chunk] = weights.mul_(shifted).sum(-1)
        if group is not None:
            dist.all_reduce(sums, group=group)
        log_partition = sums[0].log()
        logprobs = sums[2] - log_partition
        entropies = log_partition - sums[1] / sums[0]
        ctx.save_for_backward(logits, local.mine, local.columns, log_partition + largest, entropies)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None, None]:
        logprob_gradient, entropy_gradient = gradients
        logits, mine, index, log_partition, entropies = ctx.saved_tensors
        if logprob_gradient is None:
            logprob_gradient = torch.zeros_like(log_partition)
        result = torch.empty_like(logits)
        for chunk in row_chunks(len(logits), ctx.chunk_rows):
            log_p = _scaled(logits[chunk], ctx.temperature).sub_(log_partition[chunk, None])
            if entropy_gradient is None:
                gradient = log_p.exp_().mul_(logprob_gradient[chunk, None].neg())
            else:
                p = log_p.clamp_(min=NO_WEIGHT).exp()
                surprise = log_p.add_(entropies[chunk, None]).mul_(entropy_gradient[chunk, None])
                gradient = p.neg_().mul_(surprise.add_(logprob_gradient[chunk, None]))
            ones = (logprob_gradient[chunk] * mine[chunk])[:, None]
            gradient.scatter_add_(-1, index[chunk][:, None], ones)
            if ctx.temperature != 1.0:
                gradient.div_(ctx.temperature)
            result[chunk] = gradient.to(result.dtype)
        return result, None, None, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return a float32 copy, divided by the temperature."""
    return logits.to(torch.float32, copy=True).div_(temperature)


class _LocalTargets(NamedTuple):
    mine: torch.Tensor
    columns: torch.Tensor


def _local_targets(
    targets: torch.Tensor, local_vocabulary: int, group: dist.ProcessGroup | None
) -> _LocalTargets:
    """Return which targets are in this rank's slice of the vocabulary, and their indices in it (0
    for the others)."""
    offset = 0 if group is None else dist.get_rank(group) * local_vocabulary
    mine = (targets >= offset) & (targets < offset + local_vocabulary)
    return _LocalTargets(mine, torch.where(mine, targets - offset, 0))


def row_chunks(length: int, size: int) -> list[slice]:
    """Return slices of at most `size` rows that cover all of them."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]

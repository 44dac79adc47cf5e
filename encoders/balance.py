"""Sharing a replicated tower's work over ranks: who computes which media, and gradients that come
out as if each computed all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def assign_media(counts: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Give each rank media of about equal patch counts: the largest first, each to the rank with
    the least.

    Args:
        counts: Patches per medium.
        num_ranks: Ranks that share them.

    Returns:
        Indices of the media per rank, ascending; the same on every rank.
    """
    loads = [0] * num_ranks
    assignment: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(counts)), key=lambda item: (-counts[item], item)):
        rank = min(range(num_ranks), key=lambda item: (loads[item], item))
        loads[rank] += counts[index]
        assignment[rank].append(index)
    return [sorted(indices) for indices in assignment]


class SumGradients(torch.autograd.Function):
    """Parameters as they are; their gradients summed over the ranks, in one collective."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=ctx.group)
        pieces = flat.split([gradient.numel() for gradient in gradients])  # type: ignore[no-untyped-call]
        summed = [
            piece.view_as(gradient).to(gradient.dtype)
            for piece, gradient in zip(pieces, gradients, strict=True)
        ]
        return (None, *summed)


class GatherFeatures(torch.autograd.Function):
    """All ranks' features in the order of the media; backward keeps this rank's part.

    The incoming gradient is the same on every rank, so nothing is summed here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local: torch.Tensor,
        group: dist.ProcessGroup,
        assignment: Sequence[Sequence[int]],
        num_features: Sequence[int],
    ) -> torch.Tensor:
        sizes = [sum(num_features[index] for index in indices) for indices in assignment]
        longest = max(sizes)
        # Gather needs equal shapes; the padding is cut off again below.
        padded = local.new_zeros((longest, local.shape[1]))
        padded[: len(local)] = local
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=group)
        features: list[torch.Tensor] = [local] * len(num_features)
        for indices, part in zip(assignment, gathered, strict=True):
            pieces = part.split(
                [
                    *(num_features[index] for index in indices),
                    longest - sum(num_features[index] for index in indices),
                ]
            )  # type: ignore[no-untyped-call]
            for index, piece in zip(indices, pieces, strict=False):
                features[index] = piece
        ctx.num_features = list(num_features)
        ctx.mine = list(assignment[group.rank()])
        return torch.cat(features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pieces = gradient.split(ctx.num_features)  # type: ignore[no-untyped-call]
        mine = [pieces[index] for index in ctx.mine]
        own = torch.cat(mine) if mine else gradient.new_zeros((0, gradient.shape[1]))
        return own, None, None, None

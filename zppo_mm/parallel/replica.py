"""Collectives of the ranks of one replica while it samples: logits, the tokens that its leader
chose, objects.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from zppo_mm.parallel import groups as parallel

T = TypeVar("T")


def broadcast_from_leader(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite a tensor on every rank of the replica by its leader's, in place; returns it."""
    group = parallel.model_group()
    if group.size() > 1:
        dist.broadcast(tensor, src=parallel.leader_of_replica(), group=group)
    return tensor


def gather_in_replica(value: T) -> list[T]:
    """Return the objects of all ranks of this replica, the same list on each."""
    group = parallel.model_group()
    collected: list[Any] = [None] * group.size()
    if group.size() == 1:
        return [value]
    dist.all_gather_object(collected, value, group=group)
    return cast(list[T], collected)


def gather_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """Return `[batch, vocabulary]` from every tensor rank's `[batch, vocabulary / tensor size]`;
    all ranks of the stage call it.
    """
    if parallel.tensor_size() == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(parallel.tensor_size())]
    dist.all_gather(parts, logits.contiguous(), group=parallel.tensor_group())
    return torch.cat(parts, dim=-1)

"""Adapters into the weights of an export: added in float32, rounded once to the file's type, and
what that rounding loses.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from zppo_mm.models.adapted import AdapterBranch, adapter_branches, is_adapted
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.mapping import Mapping
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)

MIN_KEPT_FRACTION = 0.99
"""Of what the adapters add; an export that keeps less is warned of."""


def merged_rounds(
    model: VisionLanguageModel, rounds: Iterable[Sequence[Mapping]], source: SafetensorsFolder
) -> Iterator[Sequence[Mapping]]:
    """Yield rounds of parameters with the adapters in them, in float32, and say at the end what the
    folder's types keep of them.

    Every rank of the first replica goes through all of it; the others export nothing, and their
    rounds pass as they are.

    Args:
        model: This rank's stage; without adapters the rounds pass as they are.
        rounds: Parameters with the weights that the adapters belong to, the network's own or
            others.
        source: Has the types of the folder.
    """
    if not is_adapted(model) or parallel.replica_rank():
        yield from rounds
        return
    branches = adapter_branches(model)
    sums = torch.zeros(3, dtype=torch.float64, device=parallel.device())
    dtypes: set[str] = set()
    for mappings in rounds:
        merged = []
        for mapping in mappings:
            branch = branches.get(mapping.name)
            if branch is not None:
                dtype = source.dtype(mapping.keys[0])
                dtypes.add(str(dtype).removeprefix("torch."))
                mapping, measured = _merge(branch, mapping, dtype)
                sums += measured.to(sums)
            merged.append(mapping)
        yield merged
        # Whoever asks for the next round still holds this one.
        merged.clear()
    dist.all_reduce(sums, group=parallel.model_group())
    _report(sums.tolist(), sorted(dtypes))


def _merge(
    branch: AdapterBranch, mapping: Mapping, dtype: torch.dtype
) -> tuple[Mapping, torch.Tensor]:
    """Return a parameter with its adapters, and three sums over its weights: added x kept, added
    squared, squared error.
    """
    weight, added = mapping.parameter.detach().float(), branch.delta_weight()
    merged = weight + added
    kept = merged.to(dtype).float() - weight.to(dtype).float()
    sums = torch.stack(
        [
            (added * kept).double().sum(),
            added.double().square().sum(),
            (kept - added).double().square().sum(),
        ]
    )
    return dataclasses.replace(mapping, parameter=cast(nn.Parameter, merged)), sums


def _report(sums: Sequence[float], dtypes: Sequence[str]) -> None:
    """Log on the first rank how much of the adapters the merged weights keep."""
    overlap, added, error = sums
    if not added or parallel.rank():
        return
    fraction, distance = overlap / added, (error / added) ** 0.5
    level = logging.INFO if fraction >= MIN_KEPT_FRACTION else logging.WARNING
    logger.log(
        level,
        "export: merged weights in %s keep %.1f%% of what the adapters add, with a relative error "
        "of %.3g; the adapters by themselves lose nothing",
        " and ".join(dtypes),
        100 * fraction,
        distance,
    )

"""Group advantages: two-step REINFORCE++ with zero-advantage groups left out.

Source: ZPPO (arXiv 2606.18216), advantage; REINFORCE++ (arXiv 2501.03262).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

AdvantageNormalization = Literal["none", "nonzero", "all"]
NORMALIZATIONS: tuple[str, ...] = get_args(AdvantageNormalization)
NORMALIZATION_EPS = 1e-8


def is_trivial(rewards: Sequence[float] | torch.Tensor) -> bool:
    """Return whether all rewards of a group are the same, so that it teaches nothing.

    Compared exactly instead of through a standard deviation: the mean of identical non-binary
    rewards (0.1, 0.1, 0.1) is not always the reward itself in floating point, and the second
    normalisation would blow that rounding up to size 1.

    Args:
        rewards: `[group]`.
    """
    values = torch.as_tensor(rewards, dtype=torch.float64)
    return bool(values.min() == values.max())


def group_advantages(
    rewards: Sequence[Sequence[float] | torch.Tensor], normalization: str = "nonzero"
) -> list[torch.Tensor]:
    """Return the advantage of every rollout of a step.

    Step 1 subtracts the mean of a rollout's own group. Step 2 standardises the result (population
    standard deviation):

    - `none`: not at all;
    - `nonzero`: with the statistics of the non-trivial groups;
    - `all`: with the statistics of all groups.

    Rollouts of trivial groups have advantage 0 in every setting. With f the fraction of rollouts in
    non-trivial groups, `A_all = A_nonzero / sqrt(f)`.

    Args:
        rewards: Per group `[group]`; groups may differ in size.
        normalization: `none`, `nonzero` or `all`.

    Returns:
        Per group `[group]` float64, in the order given.

    Raises:
        ValueError: On an unknown normalisation, an empty group or a reward that is not finite.

    Source: ZPPO, advantage.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"group_advantages: unknown normalization, got {normalization!r}, expected one of "
            f"{', '.join(NORMALIZATIONS)}; set algorithm.advantage_normalization to one of them"
        )
    groups = [_checked(index, group) for index, group in enumerate(rewards)]
    trivial = [is_trivial(group) for group in groups]
    centred = [
        torch.zeros_like(g) if flat else g - g.mean()
        for g, flat in zip(groups, trivial, strict=True)
    ]
    if normalization == "none" or all(trivial):
        return centred
    counted = [
        c for c, flat in zip(centred, trivial, strict=True) if normalization == "all" or not flat
    ]
    values = torch.cat(counted)
    mean, std = values.mean(), values.std(correction=0)
    return [
        c if flat else (c - mean) / (std + NORMALIZATION_EPS)
        for c, flat in zip(centred, trivial, strict=True)
    ]


def _checked(index: int, group: Sequence[float] | torch.Tensor) -> torch.Tensor:
    values = torch.as_tensor(group, dtype=torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(
            f"group_advantages: group {index} has no list of rewards, got shape "
            f"{tuple(values.shape)}, expected [group] with at least one rollout; drop empty groups "
            "(and count them) before"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"group_advantages: group {index} has a reward that is not finite, got "
            f"{values.tolist()}, expected numbers; check the reward"
        )
    return values

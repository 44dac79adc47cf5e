"""Whether processes can be split into a parallel layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError

_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def validate_layout(config: ParallelConfig, world_size: int, num_others: int = 0) -> None:
    """Check that the processes can be split into the layout.

    Args:
        config: The layout.
        world_size: Processes to be laid out.
        num_others: Further processes of the job, which have a layout of their own.

    Raises:
        ConfigError: A size is below 1, or the world size is no multiple of tensor x pipeline x
            context.
    """
    sizes = {
        name: int(getattr(config, name))
        for name in _SIZES
        if name != "context_parallel_size" or config.context_parallel_size != 1
    }
    if min(sizes.values()) < 1:
        got = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(f"parallel: sizes must be at least 1, got {got}; set each to 1 or more")
    model_size = math.prod(sizes.values())
    if world_size % model_size == 0:
        return
    asked = " x ".join(f"{name.split('_')[0]} {size}" for name, size in sizes.items())
    nearest = zip(sizes, _nearest_layout(list(sizes.values()), world_size), strict=True)
    more = (world_size // model_size + 1) * model_size + num_others
    raise ConfigError(
        f"parallel: {world_size} process(es) cannot be split into {asked}, got a world size of "
        f"{world_size}, expected a multiple of {model_size}; start {more} processes (torchrun "
        "--nproc-per-node), or set the nearest layout that works: "
        + " ".join(f"parallel.{name}={size}" for name, size in nearest)
    )


def _nearest_layout(sizes: Sequence[int], world_size: int) -> tuple[int, ...]:
    """Return the largest layout not above the configured one that divides the world size; on a tie
    more of what comes first.
    """
    layouts = itertools.product(*(range(1, size + 1) for size in sizes))
    return max(
        (layout for layout in layouts if world_size % math.prod(layout) == 0),
        key=lambda layout: (math.prod(layout), layout),
    )

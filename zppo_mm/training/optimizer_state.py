"""What megatron-core's optimizers keep of every parameter, found by the parameter itself and
written under its name.

Megatron's own description of that state is by parameter numbers, which its distributed and its
half-precision optimizer count differently where parameters of float32 and of bfloat16 are in one
group; and it gathers all of the state on every rank. Here each rank describes its part. The
checkpoint does not depend on which optimizer is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from zppo_mm.weights.tensor_shards import TensorShard, flat_shards_of

PREFIX = "optimizer.state"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """What one rank's optimizer updates of a parameter.

    Attributes:
        parameter: Of the model.
        main: float32: the parameter's elements from `start` on, or a copy of them where the model
            keeps them in bfloat16.
        start: First element, in memory order.
        state: The optimizer's own state of `main`; the moments in `train.optimizer_state_dtype`.
    """

    parameter: torch.nn.Parameter
    main: torch.Tensor
    start: int
    state: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps beside the weights, by name; `param` is the float32 copy,
        if there is one.
        """
        named = {name: self.state[name] for name in _MOMENTS}
        return (
            named
            if self.parameter.dtype == self.main.dtype
            else {"param": self.main.detach(), **named}
        )


def parameter_shards(optimizer: Any) -> list[ParameterShard]:
    """Return this rank's part of the optimizer state; what was never updated starts at zero.

    Args:
        optimizer: From `build_optimizer`.
    """
    found = []
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        part.init_state_fn(part.optimizer, part.config)
        for parameter, main, start in _mains(part):
            state = part.optimizer.state[main]
            if not HAVE_APEX_OR_TE:
                state.setdefault("step", torch.tensor(0.0))
            found.append(ParameterShard(parameter, main, start, state))
    return found


def keep_moments_in(optimizer: Any, dtype: torch.dtype) -> None:
    """Have the moments kept in a smaller type between updates. An update is computed in float32;
    while it runs, all moments of this rank are float32.

    megatron-core's own `exp_avg_dtype` needs Transformer Engine's optimizer and the distributed
    one; this works with every optimizer that it builds.

    Args:
        optimizer: From megatron-core, before its first update.
        dtype: Of the moments.
    """
    parameter_shards(optimizer)
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        _cast_moments(part.optimizer, dtype)
        part.optimizer.register_step_pre_hook(
            lambda inner, args, kwargs: _cast_moments(inner, torch.float32)
        )
        part.optimizer.register_step_post_hook(
            lambda inner, args, kwargs: _cast_moments(inner, dtype)
        )


def _cast_moments(inner: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    for state in inner.state.values():
        for name in _MOMENTS:
            state[name] = state[name].to(dtype)


def _mains(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int]]:
    """Yield the model's parameters, what the optimizer updates of each, and where that begins."""
    if isinstance(part, DistributedOptimizer):
        kinds = [
            (part.model_fp32_groups, part.shard_fp32_groups),
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        kinds = [
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
            (part.float16_groups, part.fp32_from_float16_groups),
        ]
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
        kinds = [(groups, groups)]
    for model_groups, main_groups in kinds:
        for models, mains in zip(model_groups, main_groups, strict=True):
            for parameter, main in zip(models, mains, strict=True):
                sharded = isinstance(part, DistributedOptimizer)
                yield (
                    parameter,
                    main,
                    part._get_model_param_range_map(parameter)["param"].start if sharded else 0,
                )


def shards(entries: dict[str, Any], found: list[ParameterShard]) -> list[TensorShard]:
    """Return the optimizer state as shards that share its memory.

    Ranks that hold the same parameter, be it a replica of the model, another tensor rank or the
    other stage with a tied embedding, cut it at the same elements: their gradient buffers have the
    same layout, and a shared embedding has a bucket of its own. So their shards are equal or
    disjoint.

    Args:
        entries: Of the model, from `save_entries`.
        found: From `parameter_shards`.
    """
    by_parameter = {id(entry.data): entry for entry in entries.values()}
    return [
        shard
        for part in found
        for name, tensor in part.tensors().items()
        for shard in flat_shards_of(
            by_parameter[id(part.parameter)], tensor.view(-1), part.start, f"{PREFIX}.{name}."
        )
    ]


def num_updates(optimizer: Any, found: list[ParameterShard]) -> int:
    """Return how many updates the state went through; 0 on a rank that trains nothing."""
    if HAVE_APEX_OR_TE:
        counts = {int(group.get("step", 0)) for group in optimizer.param_groups if group["params"]}
    else:
        counts = {int(part.state["step"]) for part in found}
    assert len(counts) <= 1, f"parameters went through different numbers of updates: {counts}"
    return counts.pop() if counts else 0


def set_num_updates(optimizer: Any, found: list[ParameterShard], count: int) -> None:
    """Have the optimizer go on after so many updates.

    Apex and Transformer Engine count per group, torch per parameter, each in a tensor of its own.
    """
    if HAVE_APEX_OR_TE:
        for group in optimizer.param_groups:
            group["step"] = count
    else:
        for part in found:
            part.state["step"].fill_(float(count))

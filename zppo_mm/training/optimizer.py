"""megatron-core's gradient buffers, optimizer and learning-rate schedule, as this project sets
them.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)

from zppo_mm.config.schema import ParallelConfig, TrainConfig
from zppo_mm.parallel.megatron_versions import data_parallel_model
from zppo_mm.training.optimizer_state import keep_moments_in


def wrap_model(model: torch.nn.Module, parallel: ParallelConfig) -> Any:
    """Return the model with gradient buffers that are summed, not averaged, over replicas.

    Args:
        model: A Megatron module with its `config`.
        parallel: Whether the optimizer is sharded and reduction overlaps.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        # A gradient that is not finite skips the update instead of ending the run.
        check_for_nan_in_grad=False,
    )
    config: Any = model.config
    mark_split_parameters(model)
    # Makes the buffers sum over replicas; the policy divides by the one global token count.
    config.calculate_per_token_loss = True
    return data_parallel_model(config, ddp_config, model)


def mark_split_parameters(model: torch.nn.Module) -> None:
    """Say of every parameter of Megatron's split layers that each tensor rank holds its own part.

    The gradient norm counts what is not marked on tensor rank 0 alone. megatron-core marks these
    parameters while it initialises them, which is turned off for a model whose weights are loaded.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            for parameter in (
                module.weight,
                module.bias if isinstance(module, ColumnParallelLinear) else None,
            ):
                if parameter is not None:
                    cast(Any, parameter).tensor_model_parallel = True


def build_optimizer(
    wrapped: Any, train: TrainConfig, parallel: ParallelConfig, params_dtype: torch.dtype
) -> Any:
    """Return Megatron's AdamW over the trainable parameters; biases and other one-dimensional
    parameters do not decay.

    Args:
        wrapped: From `wrap_model`.
        train: Learning rate, betas, decay, clipping, type of the moments.
        parallel: Whether the optimizer state is sharded over replicas.
        params_dtype: Type of the weights; below float32 the optimizer keeps float32 copies.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    if train.optimizer_state_dtype == "bfloat16":
        keep_moments_in(optimizer, torch.bfloat16)
    return optimizer


def build_scheduler(optimizer: Any, train: TrainConfig) -> Any:
    """Return the schedule of the learning rate: a rise from 0 over `lr_warmup_updates`, then
    constant, or down to `min_lr` at `decay_updates` and constant from there on.
    """
    falls = train.lr_decay_style != "constant"
    # The class needs an end after the warm-up, even of a constant schedule.
    decay_updates = train.decay_updates if falls else train.lr_warmup_updates + 1
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.lr_warmup_updates,
        lr_decay_steps=decay_updates,
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        # A resumed run takes its values from the configuration, not from the checkpoint.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def gradient_norm(optimizer: Any) -> float:
    """Move the reduced gradients to the optimizer and return their norm over all parameters of the
    model.
    """
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    return float(norm) if norm is not None else math.nan


def clip_and_step(optimizer: Any, norm: float) -> None:
    """Scale the gradients so that their norm is at most `clip_grad`, and update the weights.

    Args:
        optimizer: After `gradient_norm`.
        norm: What that returned, finite.
    """
    clip = optimizer.config.clip_grad
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if clip > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
    optimizer.step_with_ready_grads()

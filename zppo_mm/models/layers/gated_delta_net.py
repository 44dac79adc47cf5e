"""Gated DeltaNet: linear attention with a recurrent state, over packed sequences, tensor-parallel
over heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from zppo_mm.models.layers.causal_convolution import causal_convolution, last_inputs
from zppo_mm.models.layers.delta_heads import HeadLayout, MixingHeads
from zppo_mm.models.layers.delta_rule import chosen_kernels, chunk_gated_delta_rule
from zppo_mm.models.layers.norm import GatedRMSNorm, apply_keeping_float32, parameter_device
from zppo_mm.models.layers.packing import Bucket, PackedLayout
from zppo_mm.models.layers.ulysses import UlyssesExchange
from zppo_mm.parallel.megatron_versions import split_sharded_tensor


@dataclass
class GatedDeltaNetSubmodules:
    """Linear layers of the module."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What is mixed.

    Attributes:
        channels: `[..., q + k + v channels]` before the convolution.
        log_decay: `[..., value_heads]` float32, as `beta`: the gates of the recurrence.
    """

    channels: torch.Tensor
    log_decay: torch.Tensor
    beta: torch.Tensor

    def pad(self, bucket: Bucket) -> _Inputs:
        """Return those of a bucket's sequences, `[sequences, tokens, ...]`."""
        return _Inputs(*map(bucket.pad, (self.channels, self.log_decay, self.beta)))


class GatedDeltaNet(MegatronModule):  # type: ignore[misc]
    """Gated DeltaNet layer with megatron-core's parameter names.

    megatron-core's own needs FLA and refuses packed sequences and inference. `A_log` and the norm
    stay float32 when the model is bfloat16.

    Args:
        config: Sizes, initialisation and parallelism.
        submodules: The linear layers.
        layer_number: Global, from 1.
        pg_collection: Process groups; Megatron's defaults if not given.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group = groups.tp
        size = self.tp_group.size()
        self.heads = HeadLayout(
            key_heads=config.linear_num_key_heads // size,
            value_heads=config.linear_num_value_heads // size,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
        )
        # FP8 is too coarse for beta and alpha.
        self.small_projections_apart = bool(config.fp8)
        projection_config = copy.copy(config)
        if self.small_projections_apart:
            # Their rows get a gradient from outside the layer too. Its fused accumulation would
            # have the gradient buffer ignore that.
            projection_config.gradient_accumulation_fusion = False
        shared = {"bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            sum(self.heads.projection) * size,
            config=projection_config,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **shared,
        )
        self._build_own_parameters(config, size)
        self.out_proj = build_module(
            submodules.out_proj,
            self.heads.value_heads * self.heads.value_dim * size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **shared,
        )
        self.fused_kernels = chosen_kernels(config)

    def _build_own_parameters(self, config: TransformerConfig, tensor_size: int) -> None:
        device, dtype = parameter_device(config), config.params_dtype
        channels, taps, heads = (
            sum(self.heads.qkv),
            config.linear_conv_kernel_dim,
            self.heads.value_heads,
        )
        self.conv1d = nn.Conv1d(
            channels,
            channels,
            taps,
            groups=channels,
            padding=taps - 1,
            bias=False,
            dtype=dtype,
            device=device,
        )
        self.dt_bias = nn.Parameter(torch.ones(heads, dtype=dtype, device=device))
        self.A_log = nn.Parameter(torch.zeros(heads, dtype=torch.float32, device=device))
        # Not built by Megatron's layers, so they are marked here: its gradient norm adds up split
        # parameters over the tensor ranks.
        for parameter in (self.conv1d.weight, self.dt_bias, self.A_log):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = 0  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]
        self.out_norm = GatedRMSNorm(
            config, self.heads.value_dim, config.layernorm_epsilon, tensor_size
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedLayout,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix tokens of each sequence, as `PackedSelfAttention.forward`."""
        projected, _bias = self.in_proj(hidden_states)
        mixed, gate, beta, alpha = projected.squeeze(1).split(
            [sum(self.heads.qkv), *self.heads.projection[3:]], dim=-1
        )
        if self.small_projections_apart:
            beta, alpha = self._small_projections(hidden_states)
        # `mixed`: `[tokens, q + k + v channels]`; `gate`: `[tokens, value_heads * value_dim]`;
        # `beta` and `alpha`: `[tokens, value_heads]`.
        heads, exchange = self._all_heads(), packed_seq_params.exchange
        if exchange is not None:
            # `[tokens / size, heads, dim]` to `[tokens, heads / size, dim]`; the gate stays, since
            # it is applied per token after the all-to-all back.
            *qkv, beta, alpha = exchange.to_heads((*heads.split(mixed), beta, alpha))
            mixed = torch.cat([part.flatten(1) for part in qkv], -1)
            heads = self._own_heads(exchange)
        # Gates of the recurrence in float32: the decay is multiplied up over whole sequences.
        beta = beta.float().sigmoid()
        log_decay = -heads.decay.exp() * F.softplus(alpha.float() + heads.decay_bias.float())
        mix = self._mix_padded if self.fused_kernels is None else self._mix_packed
        output = mix(heads, _Inputs(mixed, log_decay, beta), packed_seq_params)
        if exchange is not None:
            # Back to all heads of this rank's tokens.
            output = exchange.to_tokens(output)
        gated = self.out_norm(output, gate.unflatten(-1, (self.heads.value_heads, -1)))
        result: tuple[torch.Tensor, torch.Tensor | None] = self.out_proj(
            gated.flatten(1).unsqueeze(1)
        )
        return result

    def _small_projections(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return beta's and alpha's inputs, `[tokens, value_heads]` each, in the parameters' own
        type.

        FP8 rounds what the decay is an exponential of; these rows of the projection cost next to
        nothing.
        """
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        heads = self.heads.value_heads
        beta, alpha = F.linear(whole.squeeze(1), self.in_proj.weight[-2 * heads :]).chunk(2, dim=-1)
        return beta, alpha

    def _all_heads(self) -> MixingHeads:
        return MixingHeads(self.heads, self.conv1d.weight, self.A_log, self.dt_bias)

    def _own_heads(self, exchange: UlyssesExchange) -> MixingHeads:
        """Return the heads that this context rank mixes after the all-to-all."""
        size = exchange.size
        layout = replace(
            self.heads,
            key_heads=self.heads.key_heads // size,
            value_heads=self.heads.value_heads // size,
        )
        # The convolution is per channel, so each of query, key and value is cut by heads by itself.
        convolution = torch.cat(
            [exchange.own_heads(part) for part in torch.split(self.conv1d.weight, self.heads.qkv)]
        )
        return MixingHeads(
            layout, convolution, exchange.own_heads(self.A_log), exchange.own_heads(self.dt_bias)
        )

    def _mix_padded(
        self, heads: MixingHeads, inputs: _Inputs, layout: PackedLayout
    ) -> torch.Tensor:
        """Run convolution and delta rule on padded batches; `[tokens, value_heads, value_dim]`."""
        cache = layout.cache
        parts, contexts, states = [], [], []
        for bucket in layout.buckets:
            # Only a cache and children need the state after the last token.
            wanted = cache is not None or bucket.has_children
            padded = inputs.pad(bucket)
            output, state = _mix_batch(heads, padded, final_state=wanted)
            parts.append(bucket.unpad(output))
            if state is None:
                continue
            # The last taps - 1 inputs before the end of each sequence, not of the padding.
            context = last_inputs(padded.channels, bucket.lengths, heads.convolution.shape[-1] - 1)
            if cache is not None:
                cache.store_linear(self.layer_number, bucket.sequences, context, state)
            if bucket.has_children:
                contexts.append(context)
                states.append(state)
        if layout.branches:
            # In the order of the buckets, to which `parent_rows` refers.
            context_of, state_of = torch.cat(contexts), torch.cat(states)
        for branch in layout.branches:
            # A parent hands the same state to each child, so the gradients of all of them add up in
            # it.
            context, state = (
                left.index_select(0, branch.parent_rows) for left in (context_of, state_of)
            )
            output, _state = _mix_batch(heads, inputs.pad(branch.bucket), context, state)
            parts.append(branch.bucket.unpad(output))
        return layout.join(parts)

    def _mix_packed(
        self, heads: MixingHeads, inputs: _Inputs, layout: PackedLayout
    ) -> torch.Tensor:
        """Run convolution and delta rule with FLA's kernels, which know packing; `[tokens,
        value_heads, value_dim]`.
        """
        assert self.fused_kernels is not None
        assert not layout.branches, "the fused kernels are not given initial states"
        convolve, rule = self.fused_kernels
        bounds = layout.long_bounds
        weight = heads.convolution.squeeze(1)
        # FLA takes a pack as a batch of one, `[1, tokens, channels]`, with the bounds beside it.
        convolved, _state = convolve(
            inputs.channels[None], weight, activation="silu", cu_seqlens=bounds
        )
        query, key, value = heads.split(convolved)
        # FLA's kernel needs as many query heads and linear key heads as value heads.
        repeats = heads.layout.value_heads // heads.layout.key_heads
        if repeats > 1:
            query, key = query.repeat_interleave(repeats, 2), key.repeat_interleave(repeats, 2)
        output, state = rule(
            query,
            key,
            value,
            g=inputs.log_decay[None],
            beta=inputs.beta[None].to(value.dtype),
            output_final_state=layout.cache is not None,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=bounds,
        )
        if layout.cache is not None:
            for bucket in layout.buckets:
                channels = bucket.pad(inputs.channels)
                context = last_inputs(channels, bucket.lengths, weight.shape[-1] - 1)
                # `[sequences, value_heads, key_dim, value_dim]`, in the order of the pack.
                layout.cache.store_linear(
                    self.layer_number, bucket.sequences, context, state[list(bucket.sequences)]
                )
        return cast(torch.Tensor, output)[0].float()

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> GatedDeltaNet:
        return apply_keeping_float32(self, ("A_log",), super()._apply, fn, recurse)  # type: ignore[return-value]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> ShardedStateDict:
        """Describe the parameters for distributed checkpointing.

        The fused projection and the convolution are saved part by part, so that another tensor size
        can cut each part.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        own = {"A_log": self.A_log, "dt_bias": self.dt_bias, "conv1d.weight": self.conv1d.weight}
        result: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups
        )
        for name in ("in_proj", "out_norm", "out_proj"):
            child = sharded_state_dict_default(
                getattr(self, name),
                f"{prefix}{name}.",
                sharded_offsets,
                metadata,
                tp_group=self.tp_group,
            )
            result.update(child)
        names = ["query", "key", "value", "z", "beta", "alpha"]
        for key, sections in (
            (f"{prefix}in_proj.weight", self.heads.projection),
            (f"{prefix}conv1d.weight", self.heads.qkv),
        ):
            result[key] = split_sharded_tensor(result[key], sections, names[: len(sections)], 0)
        return result


def _mix_batch(
    heads: MixingHeads,
    inputs: _Inputs,
    context: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run convolution and delta rule on one padded batch, from the start or from what parents
    left.
    """
    query, key, value = heads.split(causal_convolution(inputs.channels, heads.convolution, context))
    return chunk_gated_delta_rule(
        query, key, value, inputs.log_decay, inputs.beta, final_state, state
    )

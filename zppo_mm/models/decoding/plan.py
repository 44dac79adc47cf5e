"""The decoding loop's view of a network: its weights in the form of the loop's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from zppo_mm.models.adapted import DecodeAdapters, decode_adapters
from zppo_mm.models.decoding.layers import (
    DecodeAttention,
    DecodeDeltaNet,
    DecodeLayer,
    Linear,
    Normed,
    RotaryStep,
)
from zppo_mm.models.layers.attention import PackedSelfAttention
from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet
from zppo_mm.models.vision_language import VisionLanguageModel

_ReadLinear = Callable[..., Linear]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """This stage's weights in the form that the loop reads; they are the model's own tensors
    wherever that form is theirs.

    Adapters stay beside their weights: in bfloat16 a merged weight would round away most of what
    small ones add.

    Attributes:
        partner: `[head_dim]` for each rotated channel its partner.
    """

    layers: tuple[DecodeLayer, ...]
    final_norm: Normed | None
    output_weight: torch.Tensor | None
    partner: torch.Tensor
    hidden_size: int
    dtype: torch.dtype

    def run(self, hidden: torch.Tensor, table: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """Run this stage's layers on `[batch, hidden]`."""
        rotary = RotaryStep(table, self.partner, self.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotary, cache)
        return hidden

    def logits(self, hidden: torch.Tensor, normalised: bool) -> torch.Tensor:
        """Return float32 logits of `[batch, hidden]` on the last stage."""
        assert self.final_norm is not None
        assert self.output_weight is not None
        return F.linear(
            hidden if normalised else self.final_norm(hidden), self.output_weight
        ).float()


def build_plan(model: VisionLanguageModel) -> DecodePlan:
    """Collect the weights of this rank's stage, as they are now."""
    architecture, language = model.architecture, model.language_model
    tensor_group = language.pg_collection.tp
    group = tensor_group if tensor_group.size() > 1 else None
    device = next(language.parameters()).device
    half = architecture.rotary_dim // 2
    partner = torch.arange(architecture.head_dim, device=device)
    partner[: 2 * half] = torch.cat([partner[half : 2 * half], partner[:half]])
    read_norm = partial(
        _norm, eps=architecture.norm_epsilon, zero_centered=architecture.zero_centered_norm
    )
    final_norm, output_weight = None, None
    if model.post_process:
        final_norm = read_norm(language.decoder.final_layernorm)
        output_weight = model.output_weight()
    read_linear = partial(_linear, decode_adapters(model))
    layers = tuple(
        _layer(layer, read_norm, read_linear, group) for layer in language.decoder.layers
    )
    return DecodePlan(
        layers,
        final_norm,
        output_weight,
        partner,
        architecture.hidden_size,
        model.config.params_dtype,
    )


def _linear(
    adapters: Mapping[nn.Module, DecodeAdapters],
    linear: Any,
    bias: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Linear:
    return Linear(linear.weight, bias, adapters.get(linear), group)


def _layer(
    layer: Any,
    read_norm: Callable[..., Normed],
    read_linear: _ReadLinear,
    group: dist.ProcessGroup | None,
) -> DecodeLayer:
    mixer = layer.self_attention
    linear = mixer.in_proj if isinstance(mixer, GatedDeltaNet) else mixer.linear_qkv
    return DecodeLayer(
        input_norm=read_norm(layer.input_layernorm, linear),
        mixer=_delta_net(mixer, read_linear, group)
        if isinstance(mixer, GatedDeltaNet)
        else _attention(mixer, read_norm, read_linear, group),
        mlp_norm=read_norm(layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        fc1=read_linear(layer.mlp.linear_fc1),
        fc2=read_linear(layer.mlp.linear_fc2, group=group),
    )


def _norm(
    norm: nn.Module, linear: nn.Module | None = None, *, eps: float, zero_centered: bool
) -> Normed:
    """Read a norm; Transformer Engine keeps its weight in the linear layer behind it."""
    weight = (
        cast(
            torch.Tensor,
            norm.weight if hasattr(norm, "weight") else cast(Any, linear).layer_norm_weight,
        )
        .detach()
        .float()
    )
    return Normed(weight + 1.0 if zero_centered else weight, eps)


def _attention(
    mixer: PackedSelfAttention,
    read_norm: Callable[..., Normed],
    read_linear: _ReadLinear,
    group: dist.ProcessGroup | None,
) -> DecodeAttention:
    groups, heads = mixer.num_query_groups_per_partition, mixer.num_attention_heads_per_partition
    qk_scale = None
    if mixer.q_layernorm is not None:
        query_scale, key_scale = (
            read_norm(norm).scale for norm in (mixer.q_layernorm, mixer.k_layernorm)
        )
        qk_scale = torch.cat([query_scale.expand(heads // groups, -1), key_scale[None]])
    return DecodeAttention(
        number=mixer.layer_number,
        qkv=read_linear(
            mixer.linear_qkv, mixer.linear_qkv.bias if mixer.config.add_qkv_bias else None
        ),
        gated=mixer.config.attention_output_gate,
        projection=read_linear(mixer.linear_proj, group=group),
        qk_scale=qk_scale,
        eps=mixer.config.layernorm_epsilon,
        groups=groups,
        repeats=heads // groups,
        head_dim=mixer.hidden_size_per_attention_head,
    )


def _delta_net(
    mixer: GatedDeltaNet, read_linear: _ReadLinear, group: dist.ProcessGroup | None
) -> DecodeDeltaNet:
    heads = mixer.heads
    taps = mixer.conv1d.weight.detach().squeeze(1).t()
    # With the newest input in slot p, slot p holds the last tap and slot p + 1 the first.
    ring = torch.stack([taps.roll(newest + 1, 0) for newest in range(len(taps))])
    inverse_root = heads.key_dim**-0.5
    return DecodeDeltaNet(
        number=mixer.layer_number,
        in_proj=read_linear(mixer.in_proj),
        out_proj=read_linear(mixer.out_proj, group=group),
        taps=ring,
        sections=[sum(heads.qkv), *heads.projection[3:]],
        key_heads=heads.key_heads,
        value_heads=heads.value_heads,
        # The norm brings vectors to length sqrt(key_dim); queries are also scaled by 1 /
        # sqrt(key_dim).
        qk_scale=torch.tensor([inverse_root * inverse_root, inverse_root], device=taps.device).view(
            2, 1, 1
        ),
        dt_bias=mixer.dt_bias.detach().float(),
        decay_rate=-mixer.A_log.detach().exp(),
        norm=Normed(mixer.out_norm.weight.detach(), mixer.out_norm.eps),
    )

"""The decoding loop's view of a network: its weights in the form of the loop's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the weights of a model's layers.

    Attributes:
        adapters: By linear layer.
        tensor_group: Adds up the outputs of divided layers; `None` on one tensor rank.
        norm_epsilon: Of all RMS norms.
        zero_centered_norm: Whether their weights are stored without 1.
    """

    adapters: Mapping[nn.Module, DecodeAdapters]
    tensor_group: dist.ProcessGroup | None
    norm_epsilon: float
    zero_centered_norm: bool

    def column_linear(self, linear: Any, bias: torch.Tensor | None = None) -> Linear:
        """Read a layer whose outputs are divided over the tensor ranks."""
        return Linear(linear.weight, bias, self.adapters.get(linear), None)

    def row_linear(self, linear: Any) -> Linear:
        """Read a layer whose inputs are divided over the tensor ranks, which add up its outputs."""
        return Linear(linear.weight, None, self.adapters.get(linear), self.tensor_group)

    def layer(self, layer: Any) -> DecodeLayer:
        """Read a layer of the decoder."""
        mixer = layer.self_attention
        linear = mixer.in_proj if isinstance(mixer, GatedDeltaNet) else mixer.linear_qkv
        return DecodeLayer(
            input_norm=self.norm(layer.input_layernorm, linear),
            mixer=self._delta_net(mixer)
            if isinstance(mixer, GatedDeltaNet)
            else self._attention(mixer),
            mlp_norm=self.norm(layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
            fc1=self.column_linear(layer.mlp.linear_fc1),
            fc2=self.row_linear(layer.mlp.linear_fc2),
        )

    def norm(self, norm: nn.Module, linear: nn.Module | None = None) -> Normed:
        """Read a norm; Transformer Engine keeps its weight in the linear layer behind it."""
        weight = (
            cast(
                torch.Tensor,
                norm.weight if hasattr(norm, "weight") else cast(Any, linear).layer_norm_weight,
            )
            .detach()
            .float()
        )
        return Normed(weight + 1.0 if self.zero_centered_norm else weight, self.norm_epsilon)

    def _attention(self, mixer: PackedSelfAttention) -> DecodeAttention:
        groups, heads = (
            mixer.num_query_groups_per_partition,
            mixer.num_attention_heads_per_partition,
        )
        qk_scale = None
        if mixer.q_layernorm is not None:
            query_scale, key_scale = (
                self.norm(norm).scale for norm in (mixer.q_layernorm, mixer.k_layernorm)
            )
            qk_scale = torch.cat([query_scale.expand(heads // groups, -1), key_scale[None]])
        return DecodeAttention(
            number=mixer.layer_number,
            qkv=self.column_linear(
                mixer.linear_qkv, mixer.linear_qkv.bias if mixer.config.add_qkv_bias else None
            ),
            gated=mixer.config.attention_output_gate,
            projection=self.row_linear(mixer.linear_proj),
            qk_scale=qk_scale,
            eps=mixer.config.layernorm_epsilon,
            groups=groups,
            repeats=heads // groups,
            head_dim=mixer.hidden_size_per_attention_head,
        )

    def _delta_net(self, mixer: GatedDeltaNet) -> DecodeDeltaNet:
        heads = mixer.heads
        taps = mixer.conv1d.weight.detach().squeeze(1).t()
        # With the newest input in slot p, slot p holds the last tap and slot p + 1 the first.
        ring = torch.stack([taps.roll(newest + 1, 0) for newest in range(len(taps))])
        inverse_root = heads.key_dim**-0.5
        return DecodeDeltaNet(
            number=mixer.layer_number,
            in_proj=self.column_linear(mixer.in_proj),
            out_proj=self.row_linear(mixer.out_proj),
            taps=ring,
            sections=[sum(heads.qkv), *heads.projection[3:]],
            key_heads=heads.key_heads,
            value_heads=heads.value_heads,
            # The norm brings vectors to length sqrt(key_dim); queries are also scaled by 1 /
            # sqrt(key_dim).
            qk_scale=torch.tensor(
                [inverse_root * inverse_root, inverse_root], device=taps.device
            ).view(2, 1, 1),
            dt_bias=mixer.dt_bias.detach().float(),
            decay_rate=-mixer.A_log.detach().exp(),
            norm=Normed(mixer.out_norm.weight.detach(), mixer.out_norm.eps),
        )


def build_plan(model: VisionLanguageModel) -> DecodePlan:
    """Collect the weights of this rank's stage, as they are now."""
    architecture, language = model.architecture, model.language_model
    tensor_group = language.pg_collection.tp
    reader = _Reader(
        decode_adapters(model),
        tensor_group if tensor_group.size() > 1 else None,
        architecture.norm_epsilon,
        architecture.zero_centered_norm,
    )
    device = next(language.parameters()).device
    half = architecture.rotary_dim // 2
    partner = torch.arange(architecture.head_dim, device=device)
    partner[: 2 * half] = torch.cat([partner[half : 2 * half], partner[:half]])
    final_norm, output_weight = None, None
    if model.post_process:
        final_norm = reader.norm(language.decoder.final_layernorm)
        output_weight = model.output_weight()
    return DecodePlan(
        tuple(reader.layer(layer) for layer in language.decoder.layers),
        final_norm,
        output_weight,
        partner,
        architecture.hidden_size,
        model.config.params_dtype,
    )

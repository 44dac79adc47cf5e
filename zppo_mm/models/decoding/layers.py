"""The layers of the decoding loop: few calls, in-place states, the training network's
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from zppo_mm.models.adapted import DecodeAdapters
from zppo_mm.models.layers.cache import DecodeCache, LinearState
from zppo_mm.models.layers.delta_rule import NORM_EPSILON
from zppo_mm.models.layers.paged_attention import attend


@dataclass(frozen=True, slots=True)
class Normed:
    """RMSNorm whose weight is already one-centred, in float32."""

    scale: torch.Tensor
    eps: float

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden.float(), self.scale.shape, self.scale, self.eps).to(hidden.dtype)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, with its adapters beside it if it has any.

    Attributes:
        weight: `[outputs, inputs]`, this rank's shard.
        bias: `[outputs]`, `None` in most families.
        adapters: What is added to its output, as the training forward pass does.
        group: The tensor-parallel ranks, if the input is split over them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    adapters: DecodeAdapters | None = None
    group: dist.ProcessGroup | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        output = F.linear(hidden, self.weight, self.bias)
        if self.adapters is None:
            if self.group is not None:
                dist.all_reduce(output, group=self.group)
            return output
        narrow = F.linear(hidden, self.adapters.down)
        if self.group is not None:
            # The narrow part goes along: B is for the sum over the ranks, as in training.
            both = torch.cat([output, narrow], 1)
            dist.all_reduce(both, group=self.group)
            output, narrow = torch.split(both, [output.shape[1], narrow.shape[1]], 1)
        return self.adapters.add_to(output, narrow)


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """Full attention of one token per sequence.

    Attributes:
        number: Global layer number.
        gated: Whether the projection holds a gate for the output.
        qk_scale: `[query heads of a group + 1, head_dim]` norm weights of queries and key; `None`
            without that norm.
        groups: KV heads on this rank.
        repeats: Query heads per KV head.
    """

    number: int
    qkv: Linear
    gated: bool
    projection: Linear
    qk_scale: torch.Tensor | None
    eps: float
    groups: int
    repeats: int
    head_dim: int

    def __call__(
        self, hidden: torch.Tensor, rotary: RotaryStep, cache: DecodeCache
    ) -> torch.Tensor:
        batch, heads, dim = len(hidden), self.repeats, self.head_dim
        keys, values = cache.attention[self.number]
        sections = [heads, heads, 1, 1] if self.gated else [heads, 1, 1]
        projected = self.qkv(hidden).view(batch, self.groups, sum(sections), dim)
        query, *gate, key, value = torch.split(projected, sections, 2)
        both = torch.cat([query, key], 2)
        if self.qk_scale is not None:
            both = (F.rms_norm(both.float(), (dim,), None, self.eps) * self.qk_scale).to(
                hidden.dtype
            )
        both = rotary(both)
        assert cache.tail is not None
        assert cache.reads is not None
        assert cache.empty is not None
        blocks, slots = cache.tail
        keys[blocks, :, slots], values[blocks, :, slots] = both[:, :, heads], value[:, :, 0]
        # The queries of one group take the axis where a kernel expects the tokens of one head, so
        # keys are never repeated.
        mixed = attend(both[:, :, :heads], keys, values, cache.empty, cache.reads)
        if self.gated:
            mixed = mixed * gate[0].sigmoid()
        return self.projection(mixed.reshape(batch, -1))


@dataclass(frozen=True, slots=True)
class DecodeDeltaNet:
    """Gated DeltaNet of one token per sequence.

    Attributes:
        number: Global layer number.
        in_proj: To query, key, value, gate, beta and alpha.
        taps: `[taps, taps, channels]` convolution weights, entry p for a ring whose newest input is
            in slot p.
        qk_scale: `[2, 1, 1]` scales normalised queries and keys to the norms of the delta rule.
        decay_rate: `[value_heads]`, minus exp(A_log).
    """

    number: int
    in_proj: Linear
    out_proj: Linear
    taps: torch.Tensor
    sections: list[int]
    key_heads: int
    value_heads: int
    qk_scale: torch.Tensor
    dt_bias: torch.Tensor
    decay_rate: torch.Tensor
    norm: Normed

    def __call__(
        self, hidden: torch.Tensor, rotary: RotaryStep, cache: DecodeCache
    ) -> torch.Tensor:
        batch, heads = len(hidden), self.value_heads
        memory: LinearState = cache.linear[self.number]
        inputs, gate, beta, alpha = torch.split(self.in_proj(hidden), self.sections, 1)
        newest = (cache.step + len(self.taps) - 1) % len(self.taps)
        ring, state = memory.inputs[:batch], memory.state[:batch]
        ring[:, newest] = inputs
        mixed = F.silu((ring * self.taps[newest]).sum(1)).float()
        key_dim, value_dim = state.shape[2:]
        width = self.key_heads * key_dim
        both = mixed[:, : 2 * width].view(batch, 2, self.key_heads, key_dim)
        both = F.rms_norm(both, (key_dim,), None, NORM_EPSILON / key_dim) * self.qk_scale
        if heads != self.key_heads:
            both = both.repeat_interleave(heads // self.key_heads, 2)
        value = mixed[:, 2 * width :].reshape(batch * heads, 1, value_dim)
        decay = (F.softplus(alpha.float() + self.dt_bias) * self.decay_rate).exp_().view(-1, 1, 1)
        output = _delta_step(
            state.view(batch * heads, key_dim, value_dim),
            both.transpose(1, 2).reshape(batch * heads, 2, key_dim),
            value,
            decay,
            beta.float().sigmoid().view(-1, 1, 1),
        )
        gated = self.norm(output.view(batch, heads, value_dim)) * F.silu(gate.float()).view(
            batch, heads, value_dim
        )
        return self.out_proj(gated.reshape(batch, -1).to(hidden.dtype))


def _delta_step(
    state: torch.Tensor,
    query_key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """Advance states `[n, key_dim, value_dim]` in place by one token and return what the queries
    read, `[n, 1, value_dim]`.

    Both reads come from the old state in one product: what the query finds in the new state is the
    decayed old read plus the new write weighted by query and key's product.
    """
    old_reads = torch.bmm(query_key, state) * decay
    query, key = query_key[:, :1], query_key[:, 1:]
    write = (value - old_reads[:, 1:]) * beta
    state.mul_(decay).addcmul_(key.transpose(1, 2), write)
    return torch.addcmul(old_reads[:, :1], (query * key).sum(-1, keepdim=True), write)


@dataclass(frozen=True, slots=True)
class DecodeLayer:
    """One decoder layer."""

    input_norm: Normed
    mixer: DecodeAttention | DecodeDeltaNet
    mlp_norm: Normed
    fc1: Linear
    fc2: Linear

    def __call__(
        self, hidden: torch.Tensor, rotary: RotaryStep, cache: DecodeCache
    ) -> torch.Tensor:
        hidden = hidden + self.mixer(self.input_norm(hidden), rotary, cache)
        gate, up = self.fc1(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.fc2(F.silu(gate) * up)


class RotaryStep:
    """The rotation of one step, for heads `[batch, groups, heads, head_dim]`; channels that are not
    rotated get angle 0.
    """

    def __init__(self, table: torch.Tensor, partner: torch.Tensor, dtype: torch.dtype) -> None:
        rotated = table.shape[-1]
        whole = table.new_zeros((2, table.shape[1], 1, 1, len(partner)))
        whole[0, ..., rotated:] = 1
        whole[..., :rotated] = table[:, :, None]
        whole[1, ..., : rotated // 2].neg_()
        self._cosine, self._sine = whole.to(dtype).unbind(0)
        self._partner = partner

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(
            heads * self._cosine, heads.index_select(-1, self._partner), self._sine
        )

"""The gated delta rule in plain torch, chunk-wise, for padded batches of short sequences."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from zppo_mm.errors import ConfigError
from zppo_mm.models.layers.norm import parameter_device

MAX_CHUNK_TOKENS_CPU = 32
MAX_CHUNK_TOKENS_GPU = 64
"""Longest chunk: work inside a chunk grows with its square, steps between chunks with their number,
which cost more on a GPU.
"""
NORM_EPSILON = 1e-6
"""Added to the squared length of queries and keys, as the fused kernels do."""
_CONVOLUTION_MODULES = ("fla.modules.causal_conv1d", "fla.modules.convolution")
"""Of flash-linear-attention from 0.6 on, and before."""
_RULE_MODULE = "fla.ops.gated_delta_rule"


def unit_length(vectors: torch.Tensor) -> torch.Tensor:
    """Scale the last axis to length 1, in float32."""
    vectors = vectors.float()
    return vectors * torch.rsqrt((vectors * vectors).sum(-1, keepdim=True) + NORM_EPSILON)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    final_state: bool = False,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the gated delta rule over every sequence of a batch.

    With the state S `[key_dim, value_dim]`, each token does S <- exp(log_decay) S, then S <- S +
    beta k (v - S^T k)^T, and reads S^T q. A token with `beta` and `log_decay` 0 leaves the state
    alone, so sequences are padded with zeros there.

    Args:
        query: `[batch, length, key_heads, key_dim]`, scaled to unit length here.
        key: Like `query`.
        value: `[batch, length, value_heads, value_dim]`; each key head serves consecutive value
            heads.
        log_decay: `[batch, length, value_heads]` float32, at most 0.
        beta: `[batch, length, value_heads]`.
        final_state: Whether to compute the state after the last token.
        initial_state: `[batch, value_heads, key_dim, value_dim]` float32 before the first token;
            empty if not given.

    Returns:
        Output `[batch, length, value_heads, value_dim]` float32, and the state `[batch,
        value_heads, key_dim, value_dim]` or `None`.

    Source: "Gated Delta Networks", arXiv 2412.06464, section 3.3; the chunk form is the UT
    transform of arXiv 2406.06484.
    """
    length, key_heads = key.shape[1:3]
    value_heads, value_dim = value.shape[2:]
    on_cpu = key.device.type == "cpu"
    num_chunks = -(-length // (MAX_CHUNK_TOKENS_CPU if on_cpu else MAX_CHUNK_TOKENS_GPU))
    size = -(-length // num_chunks)
    padding = num_chunks * size - length
    query, key, value = (
        _chunks(tensor, num_chunks, padding)
        for tensor in (unit_length(query), unit_length(key), value.float())
    )
    query = query * query.shape[-1] ** -0.5
    beta, decay = (
        _chunks(tensor.float()[..., None], num_chunks, padding) for tensor in (beta, log_decay)
    )
    decay = decay.squeeze(-1).cumsum(-1)

    # Inside a chunk: token i sees token j <= i through the decay accumulated between them.
    future = torch.full((size, size), float("-inf"), device=key.device).triu(1)
    between = (decay[..., :, None] + (future - decay[..., None, :])).exp()
    transposed = key.transpose(-1, -2)
    key_products, query_products = key @ transposed, query @ transposed
    if value_heads != key_heads:
        repeats = value_heads // key_heads
        query, key, key_products, query_products = (
            t.repeat_interleave(repeats, 2) for t in (query, key, key_products, query_products)
        )
    reads = query_products * between
    since_start = decay.exp()[..., None]
    # What each token writes depends on what the tokens before it wrote: one triangular system per
    # chunk.
    writes = _UnitLowerSolve.apply(  # type: ignore[no-untyped-call]
        key_products * between * beta, torch.cat([value, key * since_start], -1) * beta
    )
    values, state_keys = writes.split([value_dim, key.shape[-1]], -1)
    # What each token leaves in the state at the end of its chunk, and what is left of the state.
    to_state = (key * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2)
    whole = decay[..., -1].exp()[..., None, None]
    scan = scan_in_turn if on_cpu else scan_by_transitions
    output, state = scan(
        _Chunks(values, state_keys, reads, query * since_start, to_state, whole),
        initial_state,
        final_state,
    )
    # `[chunks, batch, heads, size, dim]` to `[batch, length, heads, dim]`.
    output = output.permute(1, 0, 3, 2, 4).flatten(1, 2)
    return (output[:, :length] if padding else output), state


class _UnitLowerSolve(torch.autograd.Function):
    """Solves with a lower triangular matrix whose diagonal is 1; what else is on or above the
    diagonal is not read.

    Through the inverse: its columns are few beside those of the right side, and both passes then
    are batched products, which on a CPU run several times as fast as batched solving.
    """

    @staticmethod
    def forward(ctx: Any, lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(
            lower, identity.expand_as(lower), upper=False, unitriangular=True
        )
        result: torch.Tensor = inverse @ right
        ctx.save_for_backward(inverse, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse, result = ctx.saved_tensors
        of_right = inverse.transpose(-1, -2) @ gradients[0]
        return (of_right @ result.transpose(-1, -2)).neg_().tril_(-1), of_right


def _chunks(tensor: torch.Tensor, num_chunks: int, padding: int) -> torch.Tensor:
    """Turn `[batch, length, heads, dim]` into `[chunks, batch, heads, size, dim]`."""
    if padding:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, padding))
    batch, length, heads, dim = tensor.shape
    return (
        tensor.reshape(batch, num_chunks, length // num_chunks, heads, dim)
        .permute(1, 0, 3, 2, 4)
        .contiguous()
    )


@dataclass(frozen=True, slots=True)
class _Chunks:
    """What follows from the chunks themselves, each `[chunks, batch, heads, ...]`.

    With the state S before a chunk, its tokens write `values - state_keys S`, read `query S + reads
    (their writes)`, and leave `whole S + to_state (their writes)`.

    Attributes:
        values: `[..., size, value_dim]`.
        state_keys: `[..., size, key_dim]`.
        reads: `[..., size, size]`.
        query: `[..., size, key_dim]`.
        to_state: `[..., key_dim, size]`.
        whole: `[..., 1, 1]`.
    """

    values: torch.Tensor
    state_keys: torch.Tensor
    reads: torch.Tensor
    query: torch.Tensor
    to_state: torch.Tensor
    whole: torch.Tensor


def scan_in_turn(
    chunks: _Chunks, state: torch.Tensor | None, final_state: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Carry the state from chunk to chunk with as few operations as there are, for a CPU; without
    one, the first starts empty.

    Returns:
        What the tokens read, `[chunks, batch, heads, size, value_dim]`, and the last state.
    """
    num_chunks = len(chunks.values)
    # Unbinding has one backward pass for all chunks; indexing would fill a whole gradient tensor
    # with zeros for each.
    parts = (getattr(chunks, part.name).unbind(0) for part in fields(chunks))
    outputs = []
    for chunk, (value, state_key, read, query, to_state, whole) in enumerate(
        zip(*parts, strict=True)
    ):
        write = value if state is None else value - state_key @ state
        outputs.append(read @ write if state is None else query @ state + read @ write)
        if final_state or chunk + 1 < num_chunks:
            added = to_state @ write
            state = added if state is None else state * whole + added
    return torch.stack(outputs), state if final_state else None


def scan_by_transitions(
    chunks: _Chunks, state: torch.Tensor | None, final_state: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `scan_in_turn`, with one product per chunk and all others for all chunks at once, for a
    GPU.

    A chunk maps the state S before it to A S + B, where A = `whole` - `to_state` `state_keys` and B
    = `to_state` `values`. That is up to twice the arithmetic, in a twentieth of the calls.
    """
    identity = torch.eye(chunks.query.shape[-1], device=chunks.query.device)
    transitions = identity * chunks.whole - chunks.to_state @ chunks.state_keys
    states = _StateScan.apply(  # type: ignore[no-untyped-call]
        transitions, chunks.to_state @ chunks.values, state
    )
    before = states[:-1]
    writes = chunks.values - chunks.state_keys @ before
    output = chunks.query @ before + chunks.reads @ writes
    return output, states[-1] if final_state else None


class _StateScan(torch.autograd.Function):
    """From A, B and the first state to the states before every chunk and after the last, by S <- A
    S + B.
    """

    @staticmethod
    def forward(
        ctx: Any, transitions: torch.Tensor, added: torch.Tensor, first: torch.Tensor | None
    ) -> torch.Tensor:
        states = added.new_empty((len(added) + 1, *added.shape[1:]))
        if first is None:
            states[0].zero_()
        else:
            states[0].copy_(first)
        flat = states.flatten(1, 2)
        by_chunk = zip(added.flatten(1, 2), transitions.flatten(1, 2), flat, flat[1:], strict=False)
        for addition, transition, before, after in by_chunk:
            torch.baddbmm(addition, transition, before, out=after)
        ctx.save_for_backward(transitions, states)
        ctx.has_first = first is not None
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        transitions, states = ctx.saved_tensors
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        flat = total.flatten(1, 2)
        turned = transitions.flatten(1, 2).transpose(-1, -2)
        for chunk in reversed(range(len(turned))):
            flat[chunk].baddbmm_(turned[chunk], flat[chunk + 1])
        of_transitions = total[1:] @ states[:-1].transpose(-1, -2)
        return of_transitions, total[1:], total[0] if ctx.has_first else None


def chosen_kernels(
    config: TransformerConfig,
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return FLA's kernels if a network of this configuration uses them, which none in float32
    does: FLA's rule refuses that.

    Raises:
        ConfigError: FLA's gradients are wrong on this GPU with this triton.
    """
    if parameter_device(config).type != "cuda" or config.params_dtype == torch.float32:
        return None
    kernels = fused_kernels()
    if kernels is not None:
        check_versions(
            version("flash-linear-attention"),
            version("triton"),
            torch.cuda.get_device_capability(),
        )
    return kernels


def fused_kernels() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return FLA's convolution and delta rule, `None` where it is not installed or does not
    load.
    """
    for module in _CONVOLUTION_MODULES:
        try:
            convolution = importlib.import_module(module).causal_conv1d
            return convolution, importlib.import_module(_RULE_MODULE).chunk_gated_delta_rule
        except Exception:
            # FLA imports triton and may fail in more ways than ImportError on a machine that it
            # does not suit.
            continue
    return None


def check_versions(fla: str, triton: str, capability: tuple[int, int]) -> None:
    """Refuse FLA with a triton that compiles its backward pass to wrong gradients.

    FLA 0.5 and 0.6 raise in the backward pass there, 0.4.2 computes. It is refused before anything
    is sampled.

    Args:
        fla: Version of flash-linear-attention.
        triton: Version of triton.
        capability: CUDA compute capability of the GPU.

    Raises:
        ConfigError: They are such a pair, on a Hopper GPU.

    Source: flash-linear-attention, issue 640.
    """
    wrong = Version("3.4") <= Version(triton) < Version("3.7.1")
    if capability[0] == 9 and wrong and Version(fla) <= Version("0.6.0"):
        raise ConfigError(
            f"flash-linear-attention: its gradients are wrong on this GPU, got version {fla} with "
            f"triton {triton} on compute capability {capability[0]}.{capability[1]}, expected "
            "triton 3.7.1 or newer, or older than 3.4; install another triton, or uninstall "
            "flash-linear-attention and fla-core: torch then computes these layers"
        )

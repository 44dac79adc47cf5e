"""The gated delta rule in plain torch, chunk-wise, for padded batches of short sequences."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from zppo_mm.errors import ConfigError
from zppo_mm.models.layers.norm import parameter_device

MAX_CHUNK_TOKENS = 32
"""Longest chunk: work inside a chunk grows with its square, steps between chunks with their
number.
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
    num_chunks = -(-length // MAX_CHUNK_TOKENS)
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
            t.repeat_interleave(repeats, 1) for t in (query, key, key_products, query_products)
        )
    reads = query_products * between
    since_start = decay.exp()[..., None]
    # What each token writes depends on what the tokens before it wrote: one triangular system per
    # chunk.
    writes = _UnitLowerSolve.apply(  # type: ignore[no-untyped-call]
        key_products * between * beta, torch.cat([value, key * since_start], -1) * beta
    )
    values, state_keys = writes.split([value_dim, key.shape[-1]], -1)
    output, state = _scan_chunks(
        values, state_keys, reads, query * since_start, key, decay, final_state, initial_state
    )
    output = output.flatten(2, 3).transpose(1, 2)
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
    """Turn `[batch, length, heads, dim]` into `[batch, heads, chunks, size, dim]`."""
    if padding:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, padding))
    batch, length, heads, dim = tensor.shape
    return (
        tensor.reshape(batch, num_chunks, length // num_chunks, heads, dim)
        .permute(0, 3, 1, 2, 4)
        .contiguous()
    )


def _scan_chunks(
    values: torch.Tensor,
    state_keys: torch.Tensor,
    reads: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    decay: torch.Tensor,
    final_state: bool,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Carry the state from chunk to chunk; without one, the first starts empty."""
    num_chunks = values.shape[2]
    until_end = (decay[..., -1:] - decay).exp()[..., None]
    # Unbinding has one backward pass for all chunks; indexing would fill a whole gradient tensor
    # with zeros for each.
    to_state = (key * until_end).transpose(-1, -2).unbind(2)
    whole = decay[..., -1].exp()[..., None, None].unbind(2)
    chunks = zip(
        values.unbind(2), state_keys.unbind(2), reads.unbind(2), query.unbind(2), strict=True
    )
    outputs = []
    for chunk, (write, state_key, read, chunk_query) in enumerate(chunks):
        if state is None:
            outputs.append(read @ write)
        else:
            write = write - state_key @ state
            outputs.append(chunk_query @ state + read @ write)
        if final_state or chunk + 1 < num_chunks:
            added = to_state[chunk] @ write
            state = added if state is None else state * whole[chunk] + added
    return torch.stack(outputs, 2), state if final_state else None


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

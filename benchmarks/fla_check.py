"""flash-linear-attention's kernels against this project's own formulas in float32, on a GPU.

    python benchmarks/fla_check.py

Compared are output, final state and gradients, each by itself: on Hopper with triton 3.4 to 3.7.0
the gradients are wrong, or FLA refuses to compute them. A run refuses such a pair at its start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zppo_mm.models.layers.causal_convolution import causal_convolution
from zppo_mm.models.layers.delta_rule import (
    check_versions,
    chunk_gated_delta_rule,
    fused_kernels,
)

SHAPES = ((4, 16, 32, (40, 100, 7)), (16, 128, 128, (1024, 512, 300)))
"""Heads, key dimension, value dimension, lengths of the packed sequences."""
CHANNELS, KERNEL_WIDTH = 256, 4


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def check_delta_rule(
    rule: Callable[..., Any], heads: int, key_dim: int, value_dim: int, lengths: Sequence[int]
) -> None:
    """Print the errors of the delta rule in bfloat16."""
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    sizes = (key_dim, key_dim, value_dim)
    drawn = [torch.randn(total, heads, size, device="cuda") for size in sizes]
    decay = -torch.rand(total, heads, device="cuda")
    beta = torch.rand(total, heads, device="cuda")
    exact = [tensor.bfloat16().float().requires_grad_() for tensor in drawn]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    outputs, states = [], []
    for parts in zip(
        *(tensor.split(list(lengths)) for tensor in (*exact, decay, beta)), strict=True
    ):
        output, state = chunk_gated_delta_rule(*(part[None] for part in parts), True, None)
        outputs.append(output[0])
        states.append(state)
    expected = torch.cat(outputs)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    found, state = rule(
        *(tensor[None] for tensor in half),
        g=decay[None],
        beta=beta[None].bfloat16(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=bounds,
    )
    print("  output", relative_error(found[0], expected))
    print("  final state", relative_error(state, torch.cat(states)))
    # Raises where FLA's gradients are wrong, before minutes go into compiling its backward pass.
    check_versions(
        version("flash-linear-attention"), version("triton"), torch.cuda.get_device_capability()
    )
    (found[0].float() * weight).sum().backward()
    for name, ours, theirs in zip("qkv", exact, half, strict=True):
        print(f"  gradient of {name}", relative_error(theirs.grad, ours.grad))


def check_convolution(convolution: Callable[..., Any], lengths: Sequence[int]) -> None:
    """Print the error of the causal convolution in bfloat16."""
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    inputs = torch.randn(sum(lengths), CHANNELS, device="cuda").bfloat16()
    weight = torch.randn(CHANNELS, KERNEL_WIDTH, device="cuda").bfloat16()
    expected = torch.cat(
        [
            causal_convolution(part[None].float(), weight.float()[:, None])[0]
            for part in inputs.split(list(lengths))
        ]
    )
    found = convolution(inputs[None], weight, activation="silu", cu_seqlens=bounds)[0][0]
    print("  convolution", relative_error(found, expected))


def main() -> None:
    """Try every shape; a kernel that refuses is named and the others go on."""
    kernels = fused_kernels()
    if kernels is None:
        print("flash-linear-attention: not installed, or it does not load; nothing to compare")
        return
    convolution, rule = kernels
    for heads, key_dim, value_dim, lengths in SHAPES:
        torch.manual_seed(0)
        print(f"heads {heads}, key {key_dim}, value {value_dim}, lengths {lengths}")
        checks: list[Callable[[], None]] = [
            lambda shape=(heads, key_dim, value_dim, lengths): check_delta_rule(rule, *shape),
            lambda lengths=lengths: check_convolution(convolution, lengths),
        ]
        for check in checks:
            try:
                check()
            except Exception as error:
                print("  failed:", repr(error)[:300])


if __name__ == "__main__":
    main()

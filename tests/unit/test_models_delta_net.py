"""Convolution and delta rule of Gated DeltaNet beside naive formulas, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zppo_mm.models.layers import delta_rule
from zppo_mm.models.layers.causal_convolution import causal_convolution
from zppo_mm.models.layers.delta_rule import chunk_gated_delta_rule, unit_length

FLOAT32 = 2e-5
"""Sums of a hundred products in float32, in another order."""
BFLOAT16 = 1e-2
"""Two roundings to 8 bits, 2**-8 each."""


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Compare relative to the largest value."""
    gap = (found.double() - wanted.double()).abs().max()
    assert gap <= tolerance * wanted.double().abs().max()


def naive_convolution(
    inputs: torch.Tensor, weight: torch.Tensor, context: torch.Tensor
) -> torch.Tensor:
    padded = torch.cat([context, inputs], 1).transpose(1, 2)
    return F.silu(F.conv1d(padded, weight, groups=len(weight))).transpose(1, 2)


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)]
)
def test_convolution_and_gradients_equal_conv1d(
    continued: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    inputs, weight, context, upstream = (
        torch.randn(size).to(dtype) for size in ((3, 9, 8), (8, 1, 4), (3, 3, 8), (3, 9, 8))
    )
    if not continued:
        context.zero_()
    leaves = [tensor.requires_grad_() for tensor in (inputs, weight, context)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    found = causal_convolution(inputs, weight, context if continued else None)
    wanted = naive_convolution(*exact)
    assert found.dtype == dtype
    assert_close(found, wanted, tolerance)
    used = 3 if continued else 2
    gradients = torch.autograd.grad(found, leaves[:used], upstream)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(wanted, exact[:used], upstream.double()), strict=True
    ):
        assert gradient.dtype == dtype
        assert_close(gradient, expected, tolerance)


def naive_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, as the docstring of the rule says."""
    query, key = unit_length(query) * query.shape[-1] ** -0.5, unit_length(key)
    repeats = value.shape[2] // key.shape[2]
    query, key = query.repeat_interleave(repeats, 2), key.repeat_interleave(repeats, 2)
    outputs = []
    for token in range(key.shape[1]):
        state = state * log_decay[:, token, :, None, None].exp()
        column = key[:, token, :, :, None]
        written = value[:, token, :, None] - column.transpose(-1, -2) @ state
        state = state + beta[:, token, :, None, None] * column @ written
        outputs.append((query[:, token, :, None] @ state).squeeze(2))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("on_gpu", [False, True], ids=["in turn", "by transitions"])
@pytest.mark.parametrize("alike", [False, True], ids=["any keys", "equal keys"])
def test_delta_rule_and_gradients_equal_the_recurrence(
    alike: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks and padding. Equal keys with a beta near 1 and no decay are the hardest system: a
    power series of its matrix would lose all digits.
    """
    if on_gpu:
        monkeypatch.setattr(delta_rule, "scan_in_turn", delta_rule.scan_by_transitions)
    torch.manual_seed(1)
    batch, length, key_heads, value_heads, dim = 2, 45, 2, 4, 8
    query, key = torch.randn(2, batch, length, key_heads, dim).unbind(0)
    value = torch.randn(batch, length, value_heads, dim)
    state = torch.randn(batch, value_heads, dim, dim)
    log_decay = -torch.rand(batch, length, value_heads)
    beta = torch.rand(batch, length, value_heads)
    if alike:
        key, log_decay = key[:, :1] + 1e-3 * key, log_decay * 1e-3
        beta = 1 - 1e-3 * beta
    leaves = [each.requires_grad_() for each in (query, key, value, log_decay, beta, state)]
    found = chunk_gated_delta_rule(*leaves[:5], True, state)
    wanted = naive_rule(*leaves)
    upstream = [torch.randn_like(each) for each in wanted]
    for output, expected in zip(found, wanted, strict=True):
        assert output is not None
        assert_close(output, expected, FLOAT32)
    for gradient, expected in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream),
        strict=True,
    ):
        assert_close(gradient, expected, 10 * FLOAT32)

"""The fused surrogate against a naive loop, hand numbers and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch

from zppo_mm.algorithms.losses import policy_loss, supervised_loss

LOW, HIGH, DUAL = 0.2, 0.28, 10.0
# Float64 on both sides; only the order of the summation differs.
ATOL = 1e-9


def naive(
    logprobs: list[float], old: list[float], advantages: list[float], mask: list[float]
) -> tuple[float, dict[str, int]]:
    total, counts = 0.0, {"tokens": 0, "low": 0, "high": 0, "dual": 0}
    for new, before, a, keep in zip(logprobs, old, advantages, mask, strict=True):
        if not keep:
            continue
        ratio = math.exp(new - before)
        value = min(ratio * a, max(1 - LOW, min(1 + HIGH, ratio)) * a)
        value = max(value, DUAL * a) if a < 0 else value
        total -= value
        counts["tokens"] += 1
        counts["low"] += a < 0 and ratio < 1 - LOW
        counts["high"] += a > 0 and ratio > 1 + HIGH
        counts["dual"] += a < 0 and ratio > DUAL
    return total, counts


def random_tokens(
    num_tokens: int = 4000,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(num_tokens, generator=rng, dtype=torch.float64)
    new = old + torch.randn(num_tokens, generator=rng, dtype=torch.float64) * 1.5
    advantages = torch.randn(num_tokens, generator=rng, dtype=torch.float64)
    mask = (torch.rand(num_tokens, generator=rng) < 0.7).double()
    return new, old, advantages, mask


def test_equals_the_naive_loop() -> None:
    tensors = random_tokens()
    loss = policy_loss(*tensors, LOW, HIGH, DUAL)
    total, counts = naive(*(t.tolist() for t in tensors))
    assert loss.loss_sum.item() == pytest.approx(total, abs=ATOL)
    fused = (loss.num_tokens, loss.num_clipped_low, loss.num_clipped_high, loss.num_dual_clipped)
    assert [int(t) for t in fused] == list(counts.values())
    assert min(counts.values()) > 10  # every branch is met


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on policy: -A, gradient -A rho
        (1.2, 1.0, -1.2, -1.2),  # inside the range
        (2.0, 1.0, -1.28, 0.0),  # clipped high: 1 + 0.28
        (0.5, 1.0, -0.5, -0.5),  # a positive advantage is never clipped from below
        (0.5, -1.0, 0.8, 0.0),  # clipped low: 1 - 0.2
        (2.0, -1.0, 2.0, 2.0),  # a negative advantage is not clipped from above
        (12.0, -1.0, 10.0, 0.0),  # ... until the dual clip
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_hand_numbers(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, dtype=torch.float64)
    result = policy_loss(
        logprobs, torch.zeros(1, dtype=torch.float64), advantage * ones, ones, LOW, HIGH, DUAL
    )
    result.loss_sum.backward()
    assert result.loss_sum.item() == pytest.approx(loss, abs=ATOL)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, abs=ATOL)


def test_gradient_equals_finite_differences() -> None:
    new, old, advantages, mask = (t[:60] for t in random_tokens())
    new.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, LOW, HIGH, DUAL).loss_sum, (new,)
    )


def test_masked_and_far_tokens_are_harmless() -> None:
    logprobs = torch.tensor([-1.0, math.nan, math.inf, 500.0, 500.0, -500.0], requires_grad=True)
    old = torch.tensor([-1.0, 0.0, math.nan, -500.0, -500.0, 500.0])
    advantages = torch.tensor([1.0, math.nan, 1.0, 0.0, -1.0, 1.0])
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    result = policy_loss(logprobs, old, advantages, mask, LOW, HIGH, DUAL)
    result.loss_sum.backward()
    assert result.loss_sum.item() == pytest.approx(-1.0 + 0.0 + 10.0, abs=1e-6)  # float32 here
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert int(result.num_tokens) == 4
    assert math.isfinite(result.kl_sum.item())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["logprobs", "old_logprobs", "advantages", "importance"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_nothing_that_is_not_finite_becomes_a_loss(
    wrong: float, field: str, advantage: float
) -> None:
    """An infinite ratio would be clipped to a finite one, and the update be made with it."""
    tokens = {name: torch.tensor([-1.0, -2.0]) for name in ("logprobs", "old_logprobs")}
    tokens |= {"advantages": torch.full((2,), advantage), "importance": torch.ones(2)}
    for mask, is_finite in (((1.0, 1.0), False), ((1.0, 0.0), True)):
        poisoned = {name: value.clone() for name, value in tokens.items()}
        poisoned[field][1] = wrong
        ones = torch.tensor(mask)
        result = policy_loss(
            mask=ones, clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=DUAL, **poisoned
        )
        assert math.isfinite(result.loss_sum.item()) is is_finite


def test_importance_weighs_each_token_and_nothing_where_the_mask_is_zero() -> None:
    logprobs = torch.zeros(4, requires_grad=True)
    advantages = torch.tensor([1.0, 2.0, -1.0, 5.0])
    weights = torch.tensor([0.5, 2.0, 1.0, math.nan])
    result = policy_loss(
        logprobs,
        torch.zeros(4),
        advantages,
        torch.tensor([1.0, 1.0, 1.0, 0.0]),
        LOW,
        HIGH,
        DUAL,
        weights,
    )
    result.loss_sum.backward()
    # At ratio 1 the loss is -w A: -(0.5 + 4 - 1) = -3.5, and its gradient -w A too.
    assert result.loss_sum.item() == pytest.approx(-3.5)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, -4.0, 1.0, 0.0]


def test_bfloat16_is_computed_in_float32() -> None:
    tensors = tuple(t.bfloat16() for t in random_tokens(200))
    result = policy_loss(*tensors, LOW, HIGH, DUAL)
    exact = policy_loss(*(t.float() for t in tensors), LOW, HIGH, DUAL)
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == exact.loss_sum.item()


def test_ratio_and_kl_sums() -> None:
    logprobs = torch.log(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    ones = torch.ones(3, dtype=torch.float64)
    result = policy_loss(logprobs, torch.zeros_like(ones), ones, ones, LOW, HIGH, DUAL)
    assert result.ratio_sum.item() == pytest.approx(3.5, abs=ATOL)
    # (1 - 1 - 0) + (2 - 1 - ln 2) + (0.5 - 1 + ln 2) = 0.5
    assert result.kl_sum.item() == pytest.approx(0.5, abs=ATOL)


def test_supervised_loss_sums_over_the_mask() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0, math.nan], requires_grad=True)
    loss = supervised_loss(logprobs, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    loss.backward()
    assert loss.item() == 6.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, -1.0, -1.0, 0.0]

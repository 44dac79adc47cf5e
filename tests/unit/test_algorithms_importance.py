"""Importance weights and rejection: hand numbers, extremes, and what they do to the gradient, by
enumerating every response of a tiny network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zppo_mm.algorithms.importance import (
    Corrected,
    Level,
    MismatchCorrection,
    corrected,
    divergences,
    importance_weights,
    logprob_gaps,
)
from zppo_mm.algorithms.losses import policy_loss
from zppo_mm.config.schema import AlgorithmConfig, RolloutConfig, RunConfig
from zppo_mm.run.build import mismatch_correction

LEVELS: tuple[Level, ...] = ("token", "sequence", "geometric")
UNCAPPED = 1e30
# Float64 on both sides.
ATOL = 1e-12


def gaps_of(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def test_weights_by_hand() -> None:
    # Ratios 0.5, 4 and 1: product 2, geometric mean 2 ** (1/3).
    gaps = gaps_of(0.5, 4.0, 1.0)
    for level, expected in (
        ("token", [0.5, 4.0, 1.0]),
        ("sequence", [2.0] * 3),
        ("geometric", [2 ** (1 / 3)] * 3),
    ):
        assert importance_weights(gaps, level).tolist() == pytest.approx(expected)
    for level, expected, truncated in (
        ("token", [0.5, 1.5, 1.0], 1),
        ("sequence", [1.5] * 3, 3),
        ("geometric", [2 ** (1 / 3)] * 3, 0),
    ):
        found = corrected(gaps, MismatchCorrection(level=level, cap=1.5))
        assert found.weights.tolist() == pytest.approx(expected)
        assert found.num_truncated == truncated
        assert not found.is_rejected
    # rho - 1 - log rho: -0.5 + log 2, 3 - log 4, 0
    assert divergences(gaps).tolist() == pytest.approx(
        [-0.5 + math.log(2), 3 - math.log(4), 0.0], abs=ATOL
    )
    assert corrected(gaps, MismatchCorrection()).weights.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("bound", "token_bound", "rejected"),
    [
        (0.0, 0.0, False),
        (1.3, 0.0, False),  # the geometric mean is 2 ** (1/3) = 1.26
        (1.25, 0.0, True),
        (0.0, 4.1, False),
        (0.0, 3.9, True),
        (1.3, 3.9, True),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_rejection_by_hand(bound: float, token_bound: float, rejected: bool, inverse: bool) -> None:
    gaps = gaps_of(0.5, 4.0, 1.0) * (-1 if inverse else 1)
    bounds = {"rejection_bound": bound, "rejection_token_bound": token_bound}
    for cap in (0.0, 2.0):
        found = corrected(gaps, MismatchCorrection(cap=cap, **bounds))
        assert found.is_rejected is rejected
        assert bool((found.weights == 0).all()) is rejected


def everything(gaps: torch.Tensor) -> Iterator[Corrected]:
    for level in LEVELS:
        yield corrected(
            gaps,
            MismatchCorrection(
                level=level, cap=2.0, rejection_bound=1.01, rejection_token_bound=100.0
            ),
        )
        yield corrected(gaps, MismatchCorrection(level=level, cap=2.0))


@given(
    st.lists(
        st.tuples(*[st.floats(-(2.0**100), 0, width=32) | st.sampled_from([-1e-8, 0.0])] * 2),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_finite_logprobs_give_finite_weights(
    pairs: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    trained, sampled = torch.tensor(pairs).to(dtype).unbind(-1)
    gaps = logprob_gaps(trained, sampled)
    for found in everything(gaps):
        assert bool(found.weights.isfinite().all())
        assert bool(((found.weights >= 0) & (found.weights <= 2.0)).all())
    assert bool((divergences(gaps) >= 0).all())
    assert bool(divergences(gaps).isfinite().all())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nothing_is_made_of_what_is_not_finite(wrong: float) -> None:
    """Neither a capped weight nor a rejected response: the loss must become NaN."""
    broken, finite = torch.tensor([-1.0, wrong, -1.0]), torch.tensor([-1.0, -2.0, -2.0])
    for trained, sampled in ((broken, finite), (finite, broken)):
        gaps = logprob_gaps(trained, sampled)
        for found in everything(gaps):
            assert not found.is_rejected
            assert math.isnan(found.weights[1])
        assert importance_weights(gaps, "token").isnan().tolist() == [False, True, False]
        for level in ("sequence", "geometric"):
            assert bool(importance_weights(gaps, level).isnan().all())


def test_the_product_of_a_long_response_keeps_its_digits() -> None:
    sampled = torch.full((12_288,), -5.0)
    gaps = logprob_gaps(sampled + 1e-4, sampled)
    expected = math.exp(sum(gaps.tolist()))
    assert importance_weights(gaps, "sequence")[0].item() == pytest.approx(expected, rel=1e-9)


class EveryResponse:
    """All responses of a network over 3 tokens whose logits depend on the token before, sampled by
    another network: expectations over the sampler's draws, exactly.
    """

    def __init__(self, length: int, distance: float, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(4, 3, generator=random, dtype=torch.float64)
        self.sampler = self.logits + distance * torch.randn(
            4, 3, generator=random, dtype=torch.float64
        )
        self.responses = list(itertools.product(range(3), repeat=length))
        self.rewards = torch.randn(len(self.responses), generator=random, dtype=torch.float64)

    def logprobs(self, logits: torch.Tensor, response: tuple[int, ...]) -> torch.Tensor:
        before = [3, *response[:-1]]
        return torch.log_softmax(logits, -1)[before, list(response)]

    def gradient(self, correction: MismatchCorrection, drawn_by: torch.Tensor) -> torch.Tensor:
        """Return the expected gradient of the loss that the trainer computes."""
        logits = self.logits.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for response, reward in zip(self.responses, self.rewards.tolist(), strict=True):
            new = self.logprobs(logits, response)
            sampled = self.logprobs(drawn_by, response)
            found = corrected(logprob_gaps(new.detach(), sampled), correction)
            loss = policy_loss(
                new,
                new.detach(),
                torch.full_like(new, reward),
                torch.ones_like(new),
                0.2,
                0.28,
                10.0,
                found.weights,
            )
            total = total + sampled.sum().exp() * loss.loss_sum
        (gradient,) = torch.autograd.grad(total, logits)
        return gradient

    def bias(self, correction: MismatchCorrection) -> float:
        """Return the distance from the on-policy gradient, by its length."""
        wanted = self.gradient(MismatchCorrection(), self.logits)
        return float((self.gradient(correction, self.sampler) - wanted).norm() / wanted.norm())


def test_the_sequence_weight_is_unbiased_and_the_token_weight_for_single_tokens() -> None:
    for seed in range(5):
        whole, single = EveryResponse(3, 0.7, seed), EveryResponse(1, 0.7, seed)
        assert whole.bias(MismatchCorrection(level="sequence", cap=UNCAPPED)) < 1e-9
        for level in LEVELS:
            assert single.bias(MismatchCorrection(level=level, cap=UNCAPPED)) < 1e-9
        # It leaves out how likely the sampler was to come to a token.
        assert whole.bias(MismatchCorrection(level="token", cap=UNCAPPED)) > 1e-3
        assert whole.bias(MismatchCorrection()) > 1e-2


def mean_bias(correction: MismatchCorrection) -> float:
    return sum(EveryResponse(3, 0.7, seed).bias(correction) for seed in range(10)) / 10


def test_every_correction_moves_the_gradient_towards_the_on_policy_one() -> None:
    """Over 10 pairs of networks; the sequence weight also with its cap."""
    without = mean_bias(MismatchCorrection())
    biases = {level: mean_bias(MismatchCorrection(level=level, cap=2.0)) for level in LEVELS}
    # 0.24, 0.60 and 0.61 of it are left over 20 pairs.
    assert biases["sequence"] < 0.4 * without
    assert max(biases.values()) < 0.75 * without


@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [
        ("megatron", {}, MismatchCorrection()),
        ("vllm", {}, MismatchCorrection(cap=2.0)),
        ("vllm", {"importance_level": "none"}, MismatchCorrection()),
        ("megatron", {"importance_cap": 3.0}, MismatchCorrection(cap=3.0)),
        (
            "vllm",
            {"importance_level": "sequence", "importance_cap": 5.0, "rejection_bound": 1.1},
            MismatchCorrection(level="sequence", cap=5.0, rejection_bound=1.1),
        ),
        (
            "megatron",
            {"rejection_token_bound": 1e4},
            MismatchCorrection(rejection_token_bound=1e4),
        ),
    ],
)
def test_the_engine_decides_where_nothing_is_set(
    engine: str, options: dict[str, Any], expected: MismatchCorrection
) -> None:
    found = mismatch_correction(
        RunConfig(rollout=RolloutConfig(engine=engine), algorithm=AlgorithmConfig(**options))
    )
    assert (found.cap, found.rejection_bound) == (expected.cap, expected.rejection_bound)
    assert found.rejection_token_bound == expected.rejection_token_bound
    assert found.level == expected.level or not found.cap
    assert found.is_on == expected.is_on

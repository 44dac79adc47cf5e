"""pass@k against counting all draws, intervals against the normal approximation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from zppo_mm.evaluation.estimators import estimate, ks_up_to, pass_at_k

# Percentiles of 2,000 resampled means of 400 questions lie within 6 % of a standard error's
# 1.96-fold, by their own sampling error.
INTERVAL_TOLERANCE = 0.06


@pytest.mark.parametrize("num_responses", [1, 2, 5, 7])
def test_pass_at_k_is_the_fraction_of_draws_with_a_right_one(num_responses: int) -> None:
    for num_correct in range(num_responses + 1):
        rewards = [1] * num_correct + [0] * (num_responses - num_correct)
        for k in range(1, num_responses + 1):
            draws = [max(draw) for draw in combinations(rewards, k)]
            assert pass_at_k(num_responses, num_correct, k) == pytest.approx(
                sum(draws) / len(draws), rel=1e-12
            )


def test_numbers_by_hand() -> None:
    # 4 responses, 1 right: C(3, 2) / C(4, 2) = 3 / 6 of the pairs miss it.
    assert pass_at_k(4, 1, 2) == 0.5
    # 8 responses, 2 right: C(6, 4) / C(8, 4) = 15 / 70 miss both.
    assert pass_at_k(8, 2, 4) == 55 / 70
    # pass@1 is the mean reward exactly, as in the evaluations of a run.
    assert [pass_at_k(3, correct, 1) for correct in range(4)] == [0, 1 / 3, 2 / 3, 1]


def test_ks_are_powers_of_two_and_all_responses() -> None:
    assert [ks_up_to(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).random(400)
    result = estimate(values.tolist(), 0, "test")
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert result.value == pytest.approx(values.mean())
    assert result.num_questions == 400
    assert result.low == pytest.approx(result.value - half, abs=INTERVAL_TOLERANCE * half)
    assert result.high == pytest.approx(result.value + half, abs=INTERVAL_TOLERANCE * half)


def test_the_interval_follows_from_seed_and_name() -> None:
    values = [0.0, 1.0, 0.25, 0.5, 1.0]
    assert estimate(values, 3, "a") == estimate(values, 3, "a")
    assert estimate(np.linspace(0, 1, 50).tolist(), 3, "a") != estimate(
        np.linspace(0, 1, 50).tolist(), 4, "a"
    )
    assert (estimate([1.0], 0, "one").low, estimate([1.0], 0, "one").high) == (1.0, 1.0)

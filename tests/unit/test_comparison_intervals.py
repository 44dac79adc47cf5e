"""Intervals: hand numbers, the exact distribution of tiny cases, pairing, and coverage."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from zppo_mm.comparison.intervals import (
    Estimate,
    bootstrap_means,
    bootstrap_ratios,
    fraction_interval,
    interval,
    mean_scores,
)

# 10,000 draws of an event of probability p have a standard error of at most 0.005; four of them.
FREQUENCY_TOLERANCE = 0.02
WILSON_TOLERANCE = 5e-4  # the table values have three decimals


def test_mean_by_hand() -> None:
    # Seed 1: 1/2, 1; seed 2: 1/4, 0. Every seed counts alike whatever its number of questions: (1/2
    # + 1/4)/2, (1 + 0)/2.
    scores = [
        np.array([[1.0, 0.0], [1.0, 1.0]]),
        np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
    ]
    assert mean_scores(scores).tolist() == [0.375, 0.5]


def exact_distribution(scores: list[np.ndarray]) -> Counter[float]:
    """Enumerate every draw of seeds and of questions within each drawn seed, with its probability,
    for one row.
    """
    num_seeds, exact = len(scores), Counter[float]()
    for seeds in product(range(num_seeds), repeat=num_seeds):
        draws = [list(product(scores[seed][0], repeat=scores[seed].shape[1])) for seed in seeds]
        for drawn in product(*draws):
            probability = 1 / num_seeds**num_seeds / np.prod([len(each) for each in draws])
            exact[round(float(np.mean([np.mean(questions) for questions in drawn])), 9)] += (
                probability
            )
    return exact


@pytest.mark.parametrize(
    "scores",
    [
        [np.array([[0.0, 1.0]])],
        [np.array([[0.0, 1.0]]), np.array([[1.0, 1.0]])],
        [np.array([[0.0, 0.5, 1.0]]), np.array([[0.25, 1.0]])],
    ],
)
def test_draws_have_the_exact_distribution(scores: list[np.ndarray]) -> None:
    exact, drawn = (
        exact_distribution(scores),
        Counter(np.round(bootstrap_means(scores)[:, 0], 9).tolist()),
    )
    assert sum(exact.values()) == pytest.approx(1)
    assert set(drawn) <= set(exact)
    for value, probability in exact.items():
        assert drawn[value] / drawn.total() == pytest.approx(probability, abs=FREQUENCY_TOLERANCE)


def test_rows_are_drawn_alike() -> None:
    # The second method is right wherever the first is and on every fourth question besides, so no
    # draw can turn the difference round, while both rows vary by themselves.
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(3):
        first = (rng.random(40) < 0.4).astype(float)
        scores.append(np.stack([first, np.maximum(first, np.arange(40) % 4 == 0)]))
    draws = bootstrap_means(scores)
    assert (draws[:, 1] >= draws[:, 0]).all()
    assert np.std(draws[:, 1] - draws[:, 0]) < 0.7 * np.std(draws[:, 0])


def test_a_row_has_the_same_draws_with_and_without_others() -> None:
    rng = np.random.default_rng(1)
    scores = [rng.random((2, 7)) for _ in range(3)]
    np.testing.assert_allclose(
        bootstrap_means([each[:1] for each in scores])[:, 0], bootstrap_means(scores)[:, 0]
    )
    assert not np.allclose(bootstrap_means(scores, seed=1), bootstrap_means(scores, seed=2))


def test_blocks_change_no_number_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [np.full((1, 30), 0.5), np.full((1, 20), 0.5)]
    monkeypatch.setattr("zppo_mm.comparison.intervals._BLOCK_COUNTS", 1000)
    assert bootstrap_means(scores)[:, 0].tolist() == pytest.approx([0.5] * 10_000)


def test_ratios_are_of_sums_over_the_same_seeds() -> None:
    counts = np.array([[[1.0, 2.0], [3.0, 10.0]], [[0.0, 4.0], [4.0, 4.0]]])
    draws = bootstrap_ratios(counts)
    # Both seeds alike in both rows: 1/2 and 0, 3/10 and 1, or one of each: 4/12 and 4/8.
    exact = {(0.5, 0.0): 0.25, (0.3, 1.0): 0.25, (4 / 12, 0.5): 0.5}
    for pair, probability in exact.items():
        found = np.isclose(draws, pair).all(axis=1).mean()
        assert found == pytest.approx(probability, abs=FREQUENCY_TOLERANCE)


def test_interval_takes_percentiles() -> None:
    # Of 0, 1, ... 1000 the quantiles 0.025 and 0.975 are 25 and 975.
    assert interval(400.0, np.arange(1001.0)) == Estimate(400.0, 25.0, 975.0)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(count: int, total: int, low: float, high: float) -> None:
    estimate = fraction_interval(count, total)
    assert estimate is not None
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
        (count / total, low, high), abs=WILSON_TOLERANCE
    )
    assert fraction_interval(0, 0) is None


@pytest.mark.medium
def test_coverage_on_synthetic_data() -> None:
    # Ten seeds of 60 questions, true difference 0.1; questions differ in difficulty, seeds in the
    # gain. The intervals are meant to hold 95 %; resampling in two stages makes them somewhat wide
    # where seeds hardly differ. 200 trials: standard error 0.015.
    rng, hits, width, trials = np.random.default_rng(3), 0, [], 200
    for _ in range(trials):
        scores = []
        for _ in range(10):
            difficulty, gain = rng.uniform(0.2, 0.7, 60), 0.1 + rng.uniform(-0.1, 0.1)
            scores.append(
                np.stack([rng.random(60) < difficulty, rng.random(60) < difficulty + gain]).astype(
                    float
                )
            )
        draws, means = bootstrap_means(scores, num_draws=500), mean_scores(scores)
        estimate = interval(means[1] - means[0], draws[:, 1] - draws[:, 0])
        hits += estimate.low <= 0.1 <= estimate.high
        width.append(estimate.high - estimate.low)
    assert 0.9 <= hits / trials <= 1.0
    # Difference on one question: variance E p(1 - p) + E q(1 - q) = 0.227 + 0.223 = 0.45, on the
    # mean of a seed 0.45 / 60 = 0.0075, and the gain adds 0.2**2 / 12 = 0.0033. Drawing 10 of 10
    # seeds keeps 9/10 of both, drawing the questions adds the first again: (0.9 * 0.0108 + 0.0075)
    # / 10 = 0.00172, and 2 * 1.96 * sqrt(0.00172) = 0.163.
    assert np.mean(width) == pytest.approx(0.163, abs=0.01)

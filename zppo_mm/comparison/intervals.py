"""Intervals: a paired bootstrap over seeds and questions, and fractions of counts. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from zppo_mm.randomness import generator

FloatArray = npt.NDArray[np.float64]

NUM_DRAWS = 10_000
BOOTSTRAP_SEED = 0
TAILS = (0.025, 0.975)
_BLOCK_COUNTS = 4_000_000
"""Question counts that are held at once."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def mean_scores(scores: Sequence[FloatArray]) -> FloatArray:
    """Return `[rows]`: the mean over seeds of the mean over a seed's questions, so that every seed
    counts alike.

    Args:
        scores: Per seed `[rows, questions]`; the rows are methods that answered the same questions.
    """
    return np.mean([of_seed.mean(axis=1) for of_seed in scores], axis=0)  # type: ignore[no-any-return]


def bootstrap_means(
    scores: Sequence[FloatArray], num_draws: int = NUM_DRAWS, seed: int = BOOTSTRAP_SEED
) -> FloatArray:
    """Return `[draws, rows]`: `mean_scores` of resampled seeds and, within each drawn seed,
    resampled questions.

    One draw is the same for all rows, so differences between rows are paired by seed and question.
    A seed that is drawn twice in one draw has its questions drawn again each time.

    Args:
        scores: Per seed `[rows, questions]`; the number of questions may differ between seeds.
        num_draws: Resamples.
        seed: Of the random stream; with it and the shapes of `scores` every draw is fixed.
    """
    rng = generator(seed, "bootstrap")
    num_seeds = len(scores)
    drawn = rng.integers(num_seeds, size=(num_draws, num_seeds))
    sums = np.zeros((num_draws, scores[0].shape[0]))
    for index, of_seed in enumerate(scores):
        num_questions = of_seed.shape[1]
        weights = np.full(num_questions, 1 / num_questions)
        for position in range(num_seeds):
            (draws,) = np.nonzero(drawn[:, position] == index)
            for block in np.array_split(draws, 1 + len(draws) * num_questions // _BLOCK_COUNTS):
                counts = rng.multinomial(num_questions, weights, size=len(block))
                sums[block] += counts @ of_seed.T / num_questions
    return sums / num_seeds


def bootstrap_ratios(
    counts: FloatArray, num_draws: int = NUM_DRAWS, seed: int = BOOTSTRAP_SEED
) -> FloatArray:
    """Return `[draws, rows]`: of resampled seeds the sum of the first counts by that of the second
    ones, 0 of nothing. One draw is the same for all rows.

    Args:
        counts: `[rows, seeds, 2]`.
        num_draws: Resamples.
        seed: Of the random stream.
    """
    num_seeds = counts.shape[1]
    drawn = generator(seed, "ratios").integers(num_seeds, size=(num_draws, num_seeds))
    sums = counts[:, drawn].sum(axis=2)
    return (sums[..., 0] / np.maximum(sums[..., 1], 1)).T  # type: ignore[no-any-return]


def interval(value: float, draws: FloatArray) -> Estimate:
    """Return a value with the percentiles of its draws `[draws]`."""
    low, high = np.quantile(draws, TAILS)
    return Estimate(float(value), float(low), float(high))


def fraction_interval(count: int, total: int) -> Estimate | None:
    """Return a fraction with Wilson's interval, which stays within 0 and 1; `None` of nothing.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if not total:
        return None
    fraction, z = count / total, NormalDist().inv_cdf(TAILS[1])
    centre = (fraction + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z
        / (1 + z * z / total)
        * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total))
    )
    return Estimate(fraction, max(0.0, centre - half), min(1.0, centre + half))

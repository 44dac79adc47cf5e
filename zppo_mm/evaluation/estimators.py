"""pass@k and its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zppo_mm.randomness import generator

NUM_RESAMPLES = 2000
COVERAGE = 0.95
BLOCK = 1 << 21
"""Drawn indices held at once, 16 MiB."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions.

    Attributes:
        value: The mean.
        low: Lower end of its 95 % interval.
        high: Upper end.
        num_questions: Questions that it is taken over.
    """

    value: float
    low: float
    high: float
    num_questions: int


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """Return the chance that at least one of k responses, drawn without replacement from those
    sampled, is right.

    Source: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374),
    equation 1.
    """
    assert 0 <= num_correct <= num_responses, "no more right ones than responses"
    assert 1 <= k <= num_responses, "k of fewer responses is no estimate"
    draws = math.comb(num_responses, k)
    # Subtracted as whole numbers: so pass@1 is the mean reward to the last bit.
    return (draws - math.comb(num_responses - num_correct, k)) / draws


def ks_up_to(num_responses: int) -> list[int]:
    """Return 1, 2, 4, … below the number of responses, and that number."""
    return [2**power for power in range(num_responses.bit_length()) if 2**power < num_responses] + [
        num_responses
    ]


def estimate(values: Sequence[float], seed: int, *path: str | int) -> Estimate:
    """Return the mean with its interval: percentiles of the means of resampled questions.

    Args:
        values: One per question, at least one.
        seed: Seed of the resampling.
        *path: Names its random stream.
    """
    drawn = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(
        _resampled_means(drawn, generator(seed, "bootstrap", *path)),
        [50 * (1 - COVERAGE), 50 * (1 + COVERAGE)],
    )
    return Estimate(sum(values) / len(values), float(low), float(high), len(values))


def _resampled_means(
    values: npt.NDArray[np.float64], random: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return `[resamples]` means, each over as many questions drawn with replacement."""
    rows = max(1, BLOCK // len(values))
    sizes = [min(rows, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, rows)]
    return np.concatenate(
        [
            values[random.integers(len(values), size=(size, len(values)))].mean(axis=1)
            for size in sizes
        ]
    )

"""How right a response is, whatever else its reward counts."""

from __future__ import annotations

from collections.abc import Mapping

ACCURACY = "accuracy"
"""The part of a reward that says how right a response is, whatever else is rewarded."""


def accuracy_of(reward: float, parts: Mapping[str, float]) -> float:
    """Return how right a response is: the accuracy part of its reward, else the reward itself."""
    return parts.get(ACCURACY, reward)


def is_correct(accuracy: float | None) -> bool:
    """Return whether a response with this accuracy is correct; `None` was not graded."""
    return accuracy is not None and accuracy >= 1

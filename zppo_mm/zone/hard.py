"""Which questions lie in the zone: hard selection, the pre-cap, and the counts of a step.

Source: ZPPO (arXiv 2606.18216), Algorithm 1, steps 1 to 3.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from zppo_mm.experience import Group
from zppo_mm.randomness import generator

# 0.29 * 100 is 28.999999999999996 in floating point; the count meant is 29.
_ROUNDING = 1e-9


def count_of_fraction(fraction: float, num_new: int) -> int:
    """Return a fraction of the new questions as a whole number, rounded down.

    Used for `rho_replay * |X_new|` and `rho_aug * |X_new|`.
    """
    return math.floor(fraction * num_new + _ROUNDING)


def select_hard(groups: Iterable[Group], tau: float) -> list[Group]:
    """Return the plain groups (new and replayed) whose mean accuracy is below tau, in the order
    given.

    Source: ZPPO, Algorithm 1, step 2.
    """
    return [group for group in groups if group.is_plain and group.accuracy < tau]


def pre_cap_draw(seed: int, step: int, question_id: str) -> float:
    """Return the number that orders questions of equal accuracy, from the stream `("pre_cap", step,
    question id)`.
    """
    return float(generator(seed, "pre_cap", step, question_id).random())


def pre_cap(
    hard: Sequence[Group], limit: int, seed: int, step: int, to_come: Iterable[str] = ()
) -> list[Group]:
    """Return the hardest groups, ascending by accuracy, at most `limit`; while groups are missing,
    those that are kept whatever the missing accuracies are.

    Equal accuracies are ordered by `pre_cap_draw`. The order of the step would always prefer new
    questions to replayed ones, which come after them, and most hard questions tie at 0.

    Args:
        hard: Hard plain groups, one per question.
        limit: Most groups.
        seed: The run's seed.
        step: Rollout step.
        to_come: Ids of the questions whose groups are missing.

    Source: ZPPO, Algorithm 1, step 3.
    """

    def key(group: Group) -> tuple[float, float, str]:
        return group.accuracy, pre_cap_draw(seed, step, group.question.id), group.uid

    # The hardest that they can turn out to be.
    missing = sorted((0.0, pre_cap_draw(seed, step, each), "") for each in to_come)
    return [
        group
        for index, group in enumerate(sorted(hard, key=key)[:limit])
        if index + bisect_left(missing, key(group)) < limit
    ]

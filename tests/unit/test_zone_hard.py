"""Hard selection, the pre-cap and the fractions of a step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.zone_builders import group
from zppo_mm.zone.hard import count_of_fraction, pre_cap, select_hard


@pytest.mark.parametrize(
    ("fraction", "num_new", "count"),
    [
        (0.25, 384, 96),
        (0.25, 7, 1),
        (0.25, 3, 0),
        (0.29, 100, 29),
        (0.1, 30, 3),
        (1.0, 5, 5),
        (0.0, 9, 0),
    ],
)
def test_fractions_round_down_and_survive_floating_point(
    fraction: float, num_new: int, count: int
) -> None:
    assert count_of_fraction(fraction, num_new) == count


def test_hard_means_plain_and_strictly_below_tau() -> None:
    groups = [
        group("none", [0, 0, 0, 0]),
        group("half", [1, 0, 1, 0]),
        group("some", [1, 0, 0, 0], "replayed"),
        group("bcq", [0, 0, 0, 0], "bcq"),
        group("ncq", [0, 0, 0, 0], "ncq"),
    ]
    assert [g.question.id for g in select_hard(groups, 0.5)] == ["none", "some"]
    assert [g.question.id for g in select_hard(groups, 0.51)] == ["none", "half", "some"]


def test_pre_cap_keeps_the_hardest_ascending_whatever_the_order() -> None:
    groups = [
        group("a", [1, 0, 0, 0]),
        group("b", [0, 0, 0, 0]),
        group("c", [1, 0, 1, 0, 0]),
        group("d", [0, 0, 0, 0, 0, 0, 0, 1]),
    ]
    for order in (groups, groups[::-1]):
        assert [g.question.id for g in pre_cap(order, 3, seed=1, step=2)] == ["b", "d", "a"]
    assert pre_cap(groups, 0, seed=1, step=2) == []


def test_ties_are_drawn_so_that_replayed_questions_have_their_chance() -> None:
    ties = [group(f"new{i}", [0, 0]) for i in range(6)] + [
        group(f"old{i}", [0, 0], "replayed") for i in range(2)
    ]
    kept_by_step = [
        [g.question.id for g in pre_cap(ties, 2, seed=0, step=step)] for step in range(60)
    ]
    fraction = sum(kept.startswith("old") for ids in kept_by_step for kept in ids) / 120
    assert 0.1 < fraction < 0.4  # two of eight are replayed; 0.25 is expected
    assert kept_by_step[0] == [g.question.id for g in pre_cap(ties[::-1], 2, seed=0, step=0)]
    assert len({tuple(ids) for ids in kept_by_step}) > 10


@given(
    num_right=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    limit=st.integers(0, 6),
    num_sampled=st.integers(0, 12),
    step=st.integers(1, 5),
)
def test_what_is_certain_to_be_kept_is_kept(
    num_right: list[int], limit: int, num_sampled: int, step: int
) -> None:
    groups = [
        group(f"q{index}", [1.0] * right + [0.0] * (8 - right))
        for index, right in enumerate(num_right)
    ]
    to_come = [each.question.id for each in groups[num_sampled:]]
    certain = pre_cap(groups[:num_sampled], limit, 0, step, to_come)
    kept = pre_cap(groups, limit, 0, step)
    # The same groups in the same order, as far as they are known.
    assert certain == [each for each in kept if each in certain]
    # As many as there can be: one that is left out goes if those to come are as hard as can be.
    worst = pre_cap(
        [*groups[:num_sampled], *(group(name, [0.0] * 8) for name in to_come)], limit, 0, step
    )
    assert certain == [each for each in worst if each.question.id not in to_come]

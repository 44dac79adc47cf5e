"""Advantages against hand numbers, the closed form and the traps of floating point."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_mm.algorithms.advantages import NORMALIZATIONS, group_advantages, is_trivial

# Float64 throughout; the epsilon of the standard deviation is 1e-8 of values around 0.5.
ATOL = 1e-6
# Rewards are shifted by at most 10, whose float64 rounding is about 1e-15 and is divided by a
# deviation of at least 0.1.
SHIFT_ATOL = 1e-9

GROUPS = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_hand_numbers_without_normalization() -> None:
    # means 1/4, 0, 1/2, 1
    expected = [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0]]
    assert [a.tolist() for a in group_advantages(GROUPS, "none")] == expected


def test_hand_numbers_nonzero() -> None:
    # Centred values of the two non-trivial groups: squares 9/16 + 3/16 = 12/16 and 4/4 = 16/16,
    # together 28/16 over 8 -> 7/32.
    std = math.sqrt(7 / 32)
    advantages = group_advantages(GROUPS, "nonzero")
    torch.testing.assert_close(
        advantages[0],
        torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64) / std,
        atol=ATOL,
        rtol=0,
    )
    torch.testing.assert_close(
        advantages[2],
        torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64) / std,
        atol=ATOL,
        rtol=0,
    )
    assert advantages[1].tolist() == advantages[3].tolist() == [0.0] * 4


@pytest.mark.parametrize("num_trivial", [0, 1, 3, 30])
def test_all_is_nonzero_over_root_of_fraction(num_trivial: int) -> None:
    groups = [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]] + [[0, 0, 0, 0]] * num_trivial
    fraction = 3 / (3 + num_trivial)
    for everything, nonzero in zip(
        group_advantages(groups, "all"), group_advantages(groups, "nonzero"), strict=True
    ):
        torch.testing.assert_close(everything, nonzero / math.sqrt(fraction), atol=ATOL, rtol=0)


rewards_lists = st.lists(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(
    groups=rewards_lists, shift=st.floats(-10, 10), normalization=st.sampled_from(NORMALIZATIONS)
)
def test_a_common_shift_of_rewards_changes_nothing(
    groups: list[list[float]], shift: float, normalization: str
) -> None:
    plain = group_advantages(groups, normalization)
    shifted = group_advantages([[r + shift for r in group] for group in groups], normalization)
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(a, b, atol=SHIFT_ATOL, rtol=0)


@settings(max_examples=60, deadline=None)
@given(groups=rewards_lists)
def test_nonzero_has_mean_zero_and_deviation_one_over_nontrivial_groups(
    groups: list[list[float]],
) -> None:
    advantages = [
        a
        for a, g in zip(group_advantages(groups, "nonzero"), groups, strict=True)
        if not is_trivial(g)
    ]
    if advantages:
        values = torch.cat(advantages)
        assert abs(values.mean().item()) < ATOL
        assert abs(values.std(correction=0).item() - 1) < ATOL


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("size", [3, 6, 7, 8])
def test_identical_rewards_that_are_not_binary_stay_exactly_zero(
    normalization: str, size: int
) -> None:
    """The float32 mean of 0.1 repeated is not 0.1: without the exact check the rounding would be
    normalised to size 1.
    """
    rewards = torch.full((size,), 0.1, dtype=torch.float32)
    assert group_advantages([rewards, rewards.double()], normalization)[0].tolist() == [0.0] * size
    mixed = group_advantages([rewards, [1.0, 0.0]], normalization)
    assert mixed[0].tolist() == [0.0] * size
    assert mixed[1][0].item() > 0


def test_wrong_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"unknown normalization, got 'std', expected one of none, nonzero, all"
    ):
        group_advantages([[1.0]], "std")
    with pytest.raises(ValueError, match="group 1 has no list of rewards"):
        group_advantages([[1.0], []])
    with pytest.raises(ValueError, match="group 0 has a reward that is not finite"):
        group_advantages([[1.0, math.nan]])

"""Plain prompts in parts: all of them once, in the order of the pre-cap's draw, each on the replica
that has its media open.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.zone_builders import group
from zppo_mm.experience import PromptInstance
from zppo_mm.rollout.sampler import split_instances
from zppo_mm.zone.hard import pre_cap, pre_cap_draw
from zppo_mm.zone.plain_schedule import PlainSchedule


def instances(count: int) -> list[PromptInstance]:
    return [group(f"q{index}", [0, 0]).instance for index in range(count)]


@given(
    count=st.integers(0, 30),
    size=st.integers(0, 5),
    num_replicas=st.integers(1, 4),
    step=st.integers(1, 50),
)
def test_every_prompt_stands_in_one_part(
    count: int, size: int, num_replicas: int, step: int
) -> None:
    asked = instances(count)
    parts = PlainSchedule(7, size, num_replicas).divide(asked, step)
    assert Counter(each.uid for part in parts for each in part) == Counter(
        each.uid for each in asked
    )
    assert all(parts)
    assert [len(part) for part in parts[:-1]] == [size * num_replicas] * (len(parts) - 1)
    if not size:
        assert parts == ([asked] if asked else [])


def test_the_first_parts_hold_what_the_pre_cap_takes_of_equally_hard_questions() -> None:
    asked = instances(40)
    for step in range(1, 6):
        parts = PlainSchedule(3, size=5).divide(asked, step)
        taken = pre_cap([group(each.question.id, [0, 0]) for each in asked], 10, 3, step)
        assert [each.question.id for part in parts[:2] for each in part] == [
            each.question.id for each in taken
        ]


@pytest.mark.parametrize(("share", "first"), [(0.0, 5), (0.5, 2), (0.4, 3), (0.01, 4), (1.0, 0)])
def test_the_last_parts_are_asked_about_ahead(share: float, first: int) -> None:
    portions = PlainSchedule(0, size=2, ahead_share=share)
    parts = portions.divide(instances(9), 1)
    assert portions.ahead(parts) == parts[first:]


def test_replicas_sample_what_the_feed_dealt_them() -> None:
    asked = instances(24)
    parts = PlainSchedule(0, size=2, num_replicas=3).divide(asked, 1)
    dealt = {each.uid: place % 3 for place, each in enumerate(asked)}
    for part in parts:
        for replica, places in enumerate(split_instances(part, 3)):
            assert {dealt[part[place].uid] for place in places} == {replica}
    for replica in range(3):
        draws = [
            pre_cap_draw(0, 1, each.question.id)
            for part in parts
            for each in part
            if dealt[each.uid] == replica
        ]
        assert draws == sorted(draws)

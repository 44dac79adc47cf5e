"""Waves of plain prompts: every prompt once, in the order of the pre-cap's draw, each on the
replica that has its media open.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.support.zone_builders import group
from zppo_mm.experience import PromptInstance
from zppo_mm.rollout.replica_parts import split_instances
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
def test_every_prompt_is_in_one_wave(count: int, size: int, num_replicas: int, step: int) -> None:
    asked = instances(count)
    waves = PlainSchedule(7, size, num_replicas).waves(asked, step)
    assert Counter(each.uid for wave in waves for each in wave) == Counter(
        each.uid for each in asked
    )
    assert all(waves)
    assert [len(wave) for wave in waves[:-1]] == [size * num_replicas] * (len(waves) - 1)
    if not size:
        assert waves == ([asked] if asked else [])


def test_the_first_waves_hold_what_the_pre_cap_takes_of_equally_hard_questions() -> None:
    asked = instances(40)
    for step in range(1, 6):
        waves = PlainSchedule(3, wave_size=5).waves(asked, step)
        taken = pre_cap([group(each.question.id, [0, 0]) for each in asked], 10, 3, step)
        assert [each.question.id for wave in waves[:2] for each in wave] == [
            each.question.id for each in taken
        ]


def test_replicas_sample_what_the_feed_gave_them() -> None:
    asked = instances(24)
    waves = PlainSchedule(0, wave_size=2, num_replicas=3).waves(asked, 1)
    replica_of = {each.uid: index % 3 for index, each in enumerate(asked)}
    for wave in waves:
        for replica, indices in enumerate(split_instances(wave, 3)):
            assert {replica_of[wave[index].uid] for index in indices} == {replica}
    for replica in range(3):
        draws = [
            pre_cap_draw(0, 1, each.question.id)
            for wave in waves
            for each in wave
            if replica_of[each.uid] == replica
        ]
        assert draws == sorted(draws)

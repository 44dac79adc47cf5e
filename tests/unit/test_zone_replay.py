"""The replay buffer against a ten-line model of it, and its saved form."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from tests.support.zone_builders import group, question
from zppo_mm.errors import CheckpointError, ConfigError
from zppo_mm.randomness import generator
from zppo_mm.zone.replay import ReplayBuffer

TAU = 0.5


def model_update(
    buffer: list[str], asked: list[tuple[str, float]], capacity: int
) -> tuple[list[str], list[str], list[str]]:
    """Return admitted, graduated and evicted ids of a buffer that is a plain list, oldest first."""
    admitted, graduated = [], []
    for name, accuracy in asked:
        if name in buffer and accuracy >= TAU:
            buffer.remove(name)
            graduated.append(name)
        elif name not in buffer and accuracy < TAU:
            buffer.append(name)
            admitted.append(name)
    evicted = [buffer.pop(0) for _ in range(max(0, len(buffer) - capacity))]
    return admitted, graduated, evicted


steps_of_questions = st.lists(
    st.dictionaries(st.integers(0, 11).map(str), st.sampled_from([0, 1, 2, 3, 4]), max_size=6),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps_of_questions, capacity=st.integers(1, 5))
def test_equals_the_model_over_any_history(steps: list[dict[str, int]], capacity: int) -> None:
    buffer, model = ReplayBuffer(capacity), list[str]()
    totals = {"admitted": 0, "graduated": 0, "evicted": 0}
    for step, asked in enumerate(steps):
        groups = [
            group(name, [1] * right + [0] * (4 - right), "replayed" if name in buffer else "new")
            for name, right in asked.items()
        ]
        update = buffer.update(
            [*groups, group("reformulated", [0, 0, 0, 0], "bcq"), group("0", [1, 1, 1, 1], "ncq")],
            TAU,
            step,
        )
        expected = model_update(
            model, [(name, right / 4) for name, right in asked.items()], capacity
        )
        assert (list(update.admitted), list(update.graduated), list(update.evicted)) == expected
        assert buffer.content() == model
        assert len(buffer) <= capacity
        assert not set(update.graduated) & set(buffer.content())
        for name in totals:
            totals[name] += len(getattr(update, name))
        if step % 3 == 2:  # a restart changes nothing
            saved = json.loads(json.dumps(buffer.state_dict()))
            restored = ReplayBuffer(capacity)
            restored.load_state_dict(saved)
            assert restored.entries() == buffer.entries()
            assert restored.state_dict() == buffer.state_dict() == saved
            buffer = restored
    fates = buffer.fates
    assert fates.admitted_by_accuracy.total() == totals["admitted"]
    assert (
        fates.graduated_by_accuracy.total()
        == fates.graduated_by_visits.total()
        == totals["graduated"]
    )
    assert fates.evicted_by_accuracy.total() == fates.evicted_by_visits.total() == totals["evicted"]
    assert (
        sum(buffer.occupancy().values())
        == len(buffer)
        == totals["admitted"] - totals["graduated"] - totals["evicted"]
    )


def test_life_of_a_question() -> None:
    buffer = ReplayBuffer(2)
    assert buffer.update(
        [group("a", [0, 0, 0, 0]), group("b", [0, 1, 0, 0]), group("easy", [1, 1, 0, 0])], TAU, 0
    ).admitted == ("a", "b")
    assert buffer.occupancy() == {0.0: 1, 0.25: 1}
    # "a" stays hard twice, once replayed and once met again through the stream; neither renews its
    # age.
    buffer.update([group("a", [0, 1, 0, 0], "replayed")], TAU, 1)
    buffer.update([group("a", [0, 0, 0, 0], "new")], TAU, 2)
    entry = buffer.entries()[0]
    assert (
        entry.question.id,
        entry.accuracy_at_admission,
        entry.admitted_step,
        entry.visits,
        entry.last_accuracy,
    ) == ("a", 0.0, 0, 2, 0.0)
    update = buffer.update([group("c", [0, 0, 0, 0])], TAU, 3)
    assert (update.admitted, update.evicted, buffer.content()) == (("c",), ("a",), ["b", "c"])
    assert buffer.update([group("b", [1, 1, 0, 0], "replayed")], TAU, 4).graduated == ("b",)
    assert buffer.content() == ["c"]
    assert buffer.fates.admitted_by_accuracy == {0.0: 2, 0.25: 1}
    assert (buffer.fates.graduated_by_accuracy, buffer.fates.graduated_by_visits) == (
        {0.25: 1},
        {1: 1},
    )
    assert (buffer.fates.evicted_by_accuracy, buffer.fates.evicted_by_visits) == ({0.0: 1}, {2: 1})


def test_a_copy_lives_by_itself() -> None:
    buffer = ReplayBuffer(4)
    buffer.update([group("a", [0, 0]), group("b", [0, 0])], 0.5, 1)
    before, copied = buffer.state_dict(), buffer.copy()
    assert copied.state_dict() == before
    copied.update([group("a", [1, 1]), group("c", [0, 0])], 0.5, 2)
    assert copied.content() == ["b", "c"]
    assert buffer.state_dict() == before


def test_two_groups_of_one_question_count_together() -> None:
    buffer = ReplayBuffer(4)
    buffer.update([group("a", [0, 0])], TAU, 0)
    # 0/2 and 2/2 make 2/4, which is tau.
    update = buffer.update([group("a", [0, 0]), group("a", [1, 1], "replayed")], TAU, 1)
    assert (update.graduated, update.admitted, buffer.content()) == (("a",), (), [])
    assert buffer.fates.graduated_by_visits == {1: 1}


def test_another_question_with_the_same_id_is_refused() -> None:
    buffer = ReplayBuffer(4)
    asked = group("a", [0, 0])
    other = replace(
        asked,
        instance=replace(
            asked.instance, question=replace(asked.question, text="What else?", source="s2")
        ),
    )
    named = (
        r"two different questions have the id 'a', got 'What is a\?' \(source 'test', train/.*:a\) "
        r"and 'What else\?' \(source 's2'"
    )
    with pytest.raises(DataError, match=named):
        buffer.update([asked, other], TAU, 0)
    buffer.update([asked], TAU, 0)
    with pytest.raises(DataError, match=named):
        buffer.update([other], TAU, 1)
    buffer.update([asked], TAU, 1)


def test_draw_is_uniform_without_replacement() -> None:
    buffer = ReplayBuffer(10)
    buffer.update([group(str(i), [0, 0]) for i in range(5)], TAU, 0)
    counts = np.zeros(5)
    for step in range(400):
        drawn = [q.id for q in buffer.draw(2, generator(0, "replay", step))]
        assert len(set(drawn)) == 2
        counts[[int(i) for i in drawn]] += 1
    assert counts.min() > 0.75 * 160  # 400 * 2 / 5 expected each, deviation about 10
    assert counts.max() < 1.25 * 160
    assert sorted(q.id for q in buffer.draw(99, generator(0, "x"))) == buffer.content()
    assert {q.id for q in buffer.draw(99, generator(0, "x"), exclude={"1", "3"})} == {"0", "2", "4"}
    assert (
        buffer.draw(3, generator(0, "x"), exclude=buffer.content())
        == ReplayBuffer(1).draw(3, generator(0, "x"))
        == []
    )
    assert buffer.draw(1, generator(0, "x"))[0] == question(
        buffer.draw(1, generator(0, "x"))[0].id
    )  # media and all


def test_smaller_capacity_after_a_restart_evicts_the_oldest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    buffer = ReplayBuffer(5)
    buffer.update([group(str(i), [0, 0]) for i in range(5)], TAU, 0)
    smaller = ReplayBuffer(2)
    smaller.load_state_dict(buffer.state_dict())
    assert smaller.content() == ["3", "4"]
    assert smaller.fates.evicted_by_accuracy == {0.0: 3}
    assert "evicted the 3 oldest" in caplog.text


@pytest.mark.parametrize(
    "state",
    [{}, {"entries": [{"question": {}}], "fates": {}}, {"entries": [], "fates": {"unknown": []}}],
)
def test_wrong_state_and_capacity_are_named(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the saved buffer cannot be read"):
        ReplayBuffer(1).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"zone.buffer_capacity: out of range, got 0"):
        ReplayBuffer(0)

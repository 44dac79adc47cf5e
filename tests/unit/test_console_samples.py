"""Samples of a step in the log."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from tests.support.zone_builders import group
from zppo_mm.config.load import load_config
from zppo_mm.observability.console_samples import MAX_CHARACTERS, log_samples


def test_they_come_from_the_whole_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    groups = [group(f"q{index}", [0.0, 1.0, 0.0]) for index in range(4)]
    groups += [group(f"q{index}", [0.0, 1.0], "bcq") for index in range(4)]
    log_samples(7, groups, 4)
    # Groups 0, 2, 4 and 6 of 8: by turns a best and a worst response.
    heads = [message.splitlines()[0] for message in caplog.messages]
    assert heads == [
        "sample of step 7: new q0, 1 media, accuracy of the group 0.33",
        "sample of step 7: new q2, 1 media, accuracy of the group 0.33",
        "sample of step 7: bcq q0, 1 media, accuracy of the group 0.50",
        "sample of step 7: bcq q2, 1 media, accuracy of the group 0.50",
    ]
    assert [message.rpartition(", got ")[2] for message in caplog.messages] == ["42", "0"] * 2
    assert caplog.messages[0].splitlines()[1:] == [
        "  prompt:   What is q0?",
        r"  response: work q0 1\n\boxed{42}",
        "  reward 1.00, student, 2 tokens (stop), answer 42, got 42",
    ]


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (1, 1), (9, 2)])
def test_no_more_than_are_asked_for_and_there(
    count: int, shown: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    nothing = dataclasses.replace(group("none", [1.0]), rollouts=())
    log_samples(1, [nothing, group("a", [1.0]), group("b", [0.0])], count)
    assert len(caplog.messages) == shown
    assert load_config(None).observability.console_samples == 0


def test_a_response_cannot_steer_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one = group("q", [1.0])
    text = "\x1b[2J\r\u202e\ud800é" + "a" * 2 * MAX_CHARACTERS + "end"
    [rollout] = one.rollouts
    rollout = dataclasses.replace(rollout, text=text, parsed="\x07")
    log_samples(1, [dataclasses.replace(one, rollouts=(rollout,))], 1)
    [message] = caplog.messages
    assert r"\x1b[2J\r\u202e\ud800é" in message
    assert message.replace("\n", "").isprintable()
    assert "aaa […] aaa" in message
    assert r"got \x07" in message
    assert len(message) < MAX_CHARACTERS + 400

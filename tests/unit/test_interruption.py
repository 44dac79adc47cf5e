"""Signals: what is handled when, what ends at once, and what the run's own processes inherit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from zppo_mm.interruption import EXIT_CODE, SIGNALS, Interruption

ROOT = Path(__file__).parents[2]
SOMEBODY, PARENT = 7, os.getppid()
PROGRAM_SECONDS = 60


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("zppo_mm.interruption.time", clock)
    return clock


def make(stop_seconds: float = 100.0, max_hours: float = 0.0) -> tuple[Interruption, list[int]]:
    ended: list[int] = []
    interruption = Interruption(end=ended.append)
    interruption.limit(stop_seconds, max_hours)
    return interruption, ended


def test_before_a_step_is_under_way_a_signal_ends_the_process() -> None:
    interruption, ended = make()
    interruption.receive("SIGTERM", SOMEBODY)
    assert ended == [EXIT_CODE]
    assert not interruption.is_requested


def test_the_first_signal_asks_and_the_second_ends() -> None:
    interruption, ended = make()
    with interruption.protected():
        interruption.receive("SIGTERM", SOMEBODY)
        assert (interruption.reason, ended) == ("SIGTERM", [])
        interruption.receive("SIGINT", SOMEBODY)
    assert ended == [EXIT_CODE]


def test_what_a_launcher_passes_on_is_no_second_signal() -> None:
    # A scheduler signals all processes; the launcher receives it too and passes it on.
    for senders in ((SOMEBODY, PARENT), (PARENT, SOMEBODY)):
        interruption, ended = make()
        with interruption.protected():
            for sender in senders:
                interruption.receive("SIGTERM", sender)
            assert ended == []
            interruption.receive("SIGTERM", senders[0])
            assert ended == [EXIT_CODE]


def test_after_the_end_signals_are_ignored() -> None:
    interruption, ended = make()
    with interruption.protected():
        interruption.receive("SIGTERM", SOMEBODY)
        interruption.close()
        interruption.receive("SIGTERM", SOMEBODY)
        interruption.receive("SIGTERM", PARENT)
    interruption.receive("SIGTERM", PARENT)
    assert ended == []


def test_the_time_for_ending_is_bounded(clock: Clock) -> None:
    interruption, ended = make(stop_seconds=5.0)
    with interruption.protected():
        interruption.check_clock()
        interruption.request("SIGTERM")
        clock.now += 4.9
        interruption.check_clock()
        assert ended == []
        clock.now += 0.2
        interruption.check_clock()
    assert ended == [EXIT_CODE]


def test_hours_count_once_there_is_a_step_to_be_saved(clock: Clock) -> None:
    interruption, ended = make(max_hours=2.0)
    clock.now += 7201.0
    interruption.check_clock()
    assert not interruption.is_requested
    with interruption.protected():
        interruption.check_clock()
        assert interruption.reason == "train.max_hours"
    without, _ = make(max_hours=0.0)
    with without.protected():
        without.check_clock()
    assert not without.is_requested
    assert ended == []


def test_what_is_held_is_due_only_when_most_of_the_time_is_over(
    clock: Clock,
) -> None:
    interruption, _ = make(stop_seconds=20.0)
    with interruption.protected():
        assert not interruption.is_due()
        interruption.request("SIGTERM")
        assert interruption.is_due()
        with interruption.held():
            assert not interruption.is_due()
            clock.now += 12.0  # more than half of it
            assert interruption.is_due()


PROGRAM = """
import logging, os, signal, subprocess, sys, time
from zppo_mm.interruption import Interruption
logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be inherited as ignored
interruption = Interruption()
interruption.listen()
interruption.limit(60, 0)
child = subprocess.Popen([sys.executable, "-c",
"import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), flush=True)"])
child.wait()
with interruption.protected():
    print("ready", flush=True)
    while not interruption.is_requested:
        sum(range(10**5))
    print("asked", interruption.reason, flush=True)
    time.sleep(100)
"""


@contextlib.contextmanager
def started_program() -> Iterator[subprocess.Popen[str]]:
    """Run the program; it does not outlive the test."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RANK", None)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_process_handles_real_signals_and_its_children_are_left_alone(
    number: signal.Signals,
) -> None:
    with started_program() as process:
        assert process.stdout is not None
        inherited = process.stdout.readline()
        assert all(f"<Signals.{each.name}" in inherited for each in SIGNALS), inherited
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"asked {number.name}\n"
        process.send_signal(number)  # while the process sleeps in a system call
        rest, _ = process.communicate(timeout=PROGRAM_SECONDS)
        assert process.returncode == EXIT_CODE
        assert rest.splitlines() == [
            "stopped at once; the same command continues from the newest complete checkpoint "
            f"(second signal, {number.name})"
        ]

"""Time by rank and phase: waiting does not count, and the rank that others wait for is named."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.interruption import Interruption
from zppo_mm.observability.metrics import Sum
from zppo_mm.observability.rank_times import (
    NUM_STEPS,
    PhaseMetrics,
    RankTimes,
    SlowRankWatch,
)
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parallel.liveness_barrier import LivenessBarrier
from zppo_mm.parallel.wait_clock import WaitClock


def test_waiting_is_no_part_of_a_rank_s_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock, marked = WaitClock(), []

    @contextmanager
    def mark(name: str) -> Iterator[None]:
        marked.append(name)
        yield

    metrics = PhaseMetrics(lambda: clock.seconds, mark)
    for busy, waiting in ((3.0, 2.0), (4.0, 0.0)):
        with metrics.phase("update"):
            now += busy
            with clock.waiting():
                now += waiting
    with clock.waiting():  # between phases
        now += 100.0
    with metrics.phase("data"):
        now += 0.5
    assert metrics.values() == {"seconds/data": 0.5, "seconds/update": 9.0}
    assert metrics.busy_seconds == {"update": 7.0, "data": 0.5}
    assert marked == ["update", "update", "data"]


def test_a_phase_that_fails_counts_too() -> None:
    metrics = PhaseMetrics()
    with pytest.raises(KeyError), metrics.phase("data"):
        raise KeyError
    assert metrics.busy_seconds["data"] == metrics.values()["seconds/data"] > 0


def test_an_exchange_counts_the_wait_for_a_late_rank() -> None:
    parallel.initialize(ParallelConfig(), seed=0)
    store, late_seconds = HashStore(), 0.3
    first, late = (
        LivenessBarrier(store, store, rank, 2, timeout_seconds=60, interruption=Interruption())
        for rank in (0, 1)
    )
    try:
        exchange = ParallelExchange(first)
        timer = threading.Timer(late_seconds, late.wait)
        timer.start()
        assert exchange.gather(["mine"]) == [["mine"]]
        timer.join()
    finally:
        first.close()
        late.close()
        parallel.shutdown()
    assert exchange.waits.seconds >= late_seconds


def times(*update: float) -> RankTimes:
    phases = [{"update": seconds, "data": 1.0} for seconds in update]
    return RankTimes([f"node{rank // 2}" for rank in range(len(update))], phases)


def test_the_slowest_rank_and_the_spread() -> None:
    found = times(3.0, 3.0, 5.0, 2.9996)
    # Totals 4, 4, 6 and 3.9996, median 4: 6 / 4 - 1.
    assert found.metrics().values() == {
        "ranks/busy_least/data": 1.0,
        "ranks/busy_least/update": 2.9996,
        "ranks/busy_most/data": 1.0,
        "ranks/busy_most/update": 5.0,
        "ranks/slowest": 2.0,
        "ranks/spread": 0.5,
    }
    assert found.record(7) == {
        "step": 7,
        "slowest": {"rank": 2, "host": "node1"},
        "seconds": {"data": [1.0] * 4, "update": [3.0, 3.0, 5.0, 3.0]},
    }


def test_a_rank_without_a_phase_has_no_time_in_it() -> None:
    found = RankTimes(["a", "a"], [{"update": 1.0}, {}])
    assert found.by_phase() == {"update": [1.0, 0.0]}
    assert RankTimes(["a", "a"], [{}, {}]).spread == 0.0


def test_one_rank_is_compared_with_nobody() -> None:
    assert times(3.0).metrics().values() == {}


def test_a_rank_that_stays_slow_is_named_once_per_spell(caplog: pytest.LogCaptureFixture) -> None:
    watch, slow, even = SlowRankWatch(), times(3.0, 3.0, 3.0, 5.0), times(3.0, 3.0, 3.0, 3.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(NUM_STEPS - 1):
            watch.check(slow)
        watch.check(even)
        assert caplog.records == []
        for _ in range(2 * NUM_STEPS):
            watch.check(slow)
        watch.check(even)
        for _ in range(NUM_STEPS):
            watch.check(slow)
    line = (
        "rank 3 on node1 keeps the others waiting: 50 % longer than the median rank, 5 steps in a "
        "row, most of it in update"
    )
    assert [record.getMessage() for record in caplog.records] == [line, line]


def test_phases_are_sums_like_those_of_any_step() -> None:
    metrics = PhaseMetrics()
    metrics.add("seconds/update", Sum(2.0))
    with metrics.phase("update"):
        pass
    # What others added under the name is not this rank's own.
    assert metrics.busy_seconds["update"] < 1.0

"""Ranks wait for a slow one longer than a collective would, learn of a dead one, and stop
together.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.launch import run_ranks
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.interruption import Interruption, StopRequested
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parallel.failures import RankFailureError
from zppo_mm.parallel.liveness_barrier import open_liveness_barrier

TIMEOUT_SECONDS = 5.0
LAYOUT = ParallelConfig(timeout_minutes=TIMEOUT_SECONDS / 60)
SLOW_SECONDS = 1.5 * TIMEOUT_SECONDS


def wait_for_a_slow_rank(use_barrier: bool) -> list[list[int]] | str:
    """Return what three rounds gathered; in the second, rank 1 comes long after a collective's time
    limit.
    """
    parallel.initialize(LAYOUT, seed=0)
    rounds = []
    try:
        with open_liveness_barrier(LAYOUT, None, Interruption()) as barrier:
            exchange = ParallelExchange(barrier if use_barrier else None)
            for number in range(3):
                if number == 1 and parallel.rank() == 1:
                    time.sleep(SLOW_SECONDS)
                rounds.append(
                    [
                        value
                        for part in exchange.gather([10 * number + parallel.rank()])
                        for value in part
                    ]
                )
    except RuntimeError:
        parallel.leave()
        return "lost"
    parallel.shutdown()
    return rounds


def test_a_slow_rank_is_waited_for() -> None:
    assert run_ranks(wait_for_a_slow_rank, 2, True) == [[[0, 1], [10, 11], [20, 21]]] * 2
    # The collective's limit is real.
    assert run_ranks(wait_for_a_slow_rank, 2, False) == ["lost", "lost"]


def lose_a_rank(how: str) -> str:
    parallel.initialize(LAYOUT, seed=0)
    try:
        with open_liveness_barrier(LAYOUT, None, Interruption()) as barrier:
            assert barrier is not None
            barrier.wait()
            if parallel.rank() == 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("it broke here")
            barrier.wait()
    except RankFailureError as error:
        return str(error)
    except ValueError:
        time.sleep(
            2 * TIMEOUT_SECONDS
        )  # the report arrives before the missing heartbeat is noticed
        return ""
    return "nothing was lost"


def test_a_rank_that_fails_is_named_at_once() -> None:
    text, _ = run_ranks(lose_a_rank, 2, "failed")
    assert (
        "parallel: rank 0 lost another process of the run, got 'rank 1: ValueError: it broke here'"
        in text
    )


@pytest.mark.timeout(300)
def test_a_dead_rank_is_missed() -> None:
    (code, output), (killed, _) = run_ranks(lose_a_rank, 2, "killed", check=False)
    assert killed == -signal.SIGKILL
    assert code == 0, output


def stop_one_rank(which: int) -> tuple[str, int]:
    """Ask one rank to stop; returns what every rank learned and how many rounds it had gathered."""
    parallel.initialize(ParallelConfig(), seed=0)
    interruption = Interruption(end=lambda code: None)
    interruption.limit(100, 0)
    rounds = 0
    with (
        interruption.protected(),
        open_liveness_barrier(ParallelConfig(), None, interruption) as barrier,
    ):
        exchange = ParallelExchange(barrier, interruption.is_due)
        exchange.gather([])
        try:
            while True:
                if rounds == 5 and parallel.rank() == which:
                    interruption.receive("SIGUSR1", 1)
                exchange.gather([])
                rounds += 1
        except StopRequested:
            deadline = time.monotonic() + 60
            while not interruption.is_requested and time.monotonic() < deadline:
                time.sleep(0.05)  # ranks without a signal read the reason from the store
            parallel.barrier()
    parallel.shutdown()
    return interruption.reason, rounds


@pytest.mark.parametrize("which", [0, 2])
def test_a_signal_at_one_rank_stops_all_at_the_same_step(which: int) -> None:
    assert run_ranks(stop_one_rank, 3, which) == [("SIGUSR1", 5)] * 3

"""One rank hangs: every rank writes its stacks, and all end with the code that a scheduler goes on
from.
"""

from __future__ import annotations

import threading
from pathlib import Path

from tests.support.launch import run_ranks
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.interruption import Interruption
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.failures import RANK_FAILURE_EXIT_CODE, RankFailureError
from zppo_mm.parallel.liveness_barrier import open_liveness_barrier
from zppo_mm.run.hangs import finding_hangs

LIMIT_SECONDS = 3.0
LAYOUT = ParallelConfig(hang_minutes=LIMIT_SECONDS / 60)


def hang(stacks: Path) -> None:
    parallel.initialize(LAYOUT, seed=0)
    try:
        with (
            open_liveness_barrier(LAYOUT, None, Interruption()) as barrier,
            finding_hangs(LAYOUT, stacks, None),
        ):
            assert barrier is not None
            for step in range(2):
                if parallel.rank() == step == 1:
                    stand_still()
                barrier.wait()
    except RankFailureError as error:
        parallel.leave()
        raise SystemExit(RANK_FAILURE_EXIT_CODE) from error


def stand_still() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def test_a_rank_that_hangs_ends_all_with_their_stacks(tmp_path: Path) -> None:
    ended = run_ranks(hang, 2, tmp_path / "stacks", check=False)
    assert [code for code, _ in ended] == [RANK_FAILURE_EXIT_CODE] * 2
    assert "rank 1: hangs, got no progress for 3 s (parallel.hang_minutes) in " in ended[1][1]
    waits, hangs = (
        (tmp_path / "stacks" / f"student_{rank:05d}.txt").read_text(encoding="utf-8")
        for rank in range(2)
    )
    assert "in stand_still" in hangs
    assert "liveness_barrier.py" in waits
    assert "in wait" in waits
    for text in (waits, hangs):
        assert "rank 1: hangs" in text

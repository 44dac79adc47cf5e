"""One rank hangs: every rank writes its stacks, and all end with the code that a scheduler goes on
from.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

from tests.support.launch import run_ranks
from tests.support.training_example import Case, build_policy, make_batches, write_tiny_folder
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.interruption import Interruption
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.failures import RANK_FAILURE_EXIT_CODE, RankFailureError
from zppo_mm.parallel.liveness_barrier import open_liveness_barrier
from zppo_mm.parallel.thread_progress import ThreadProgress
from zppo_mm.run.hangs import BOUNDED_WAITS, finding_hangs

LIMIT_SECONDS = 3.0
LAYOUT = ParallelConfig(hang_minutes=LIMIT_SECONDS / 60)
STAGES = Case(layout=ParallelConfig(pipeline_model_parallel_size=2))
PATIENCE_SECONDS = 120.0
NUM_CHECKS = 20


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


def wait_for_a_stage(folder: Path) -> list[bool]:
    """Train on two stages, of which the first begins only when the second has been checked."""
    policy, batches = build_policy(folder, STAGES), make_batches(STAGES)
    moves: list[bool] = []
    if parallel.is_first_stage():
        parallel.store().wait(["checked"], timedelta(seconds=PATIENCE_SECONDS))
        policy.train_step(batches)
        return moves

    def watch() -> None:
        progress = ThreadProgress(
            threading.main_thread(), BOUNDED_WAITS, is_computing_progress=False
        )
        deadline = time.monotonic() + PATIENCE_SECONDS / 2
        while "p2p_communication" not in progress.where and time.monotonic() < deadline:
            progress.has_moved()
        moves.extend(progress.has_moved() for _ in range(NUM_CHECKS))
        moves.append("p2p_communication" in progress.where)
        parallel.store().set("checked", "1")

    watcher = threading.Thread(target=watch)
    watcher.start()
    policy.train_step(batches)
    watcher.join()
    return moves


def test_a_stage_that_waits_for_the_one_before_is_no_hang(tmp_path: Path) -> None:
    (_, moves) = run_ranks(wait_for_a_stage, 2, write_tiny_folder(tmp_path / "tiny"))
    assert moves == [True] * (NUM_CHECKS + 1)

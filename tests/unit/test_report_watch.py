"""A run in a terminal: only new lines are read, and what is shown follows from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.running import run_python
from tests.support.simulated_run import simulate_run
from zppo_mm.report.watch import ROWS_KEPT, NewLines, describe, sparkline


def test_only_what_was_added_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    new = NewLines(path)
    new.read()
    assert not new.rows
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    new.read()
    assert [row["step"] for row in new.rows] == [1, 2]
    # What was read before could not be read now.
    with path.open("r+") as file:
        file.write("?" * 11)
        file.seek(0, os.SEEK_END)
        file.write('ep": 3}\n')
    new.read()
    assert [row["step"] for row in new.rows] == [1, 2, 3]
    with path.open("a") as file:
        file.writelines(f'{{"step": {step}}}\n' for step in range(4, 100))
    new.read()
    assert [row["step"] for row in new.rows] == list(range(100 - ROWS_KEPT, 100))


def test_a_resumed_run_is_read_from_its_start(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    new = NewLines(path)
    new.read()
    # As a resume does: the later steps go, in a file that takes the place of this one.
    other.write_text('{"step": 1}\n{"step": 2, "again": 1}\n')
    other.replace(path)
    new.read()
    assert [dict(row) for row in new.rows] == [{"step": 1}, {"step": 2, "again": 1}]


def test_curves_of_blocks() -> None:
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▁▁"


def test_what_is_shown() -> None:
    rows = [
        {
            "step": step,
            "accuracy/plain": step / 4,
            "policy/loss": None,
            "policy/skipped_updates": float(step == 2),
            "rollout/failed_groups": 0.0,
            "seconds/step": 30.0,
            "seconds/update": 20.0,
            "seconds/data": 1.0,
            "ranks/slowest": 3.0,
            "ranks/spread": 0.25,
        }
        for step in (1, 2)
    ]
    evaluations = [{"step": 0, "accuracy": 0.125}]
    # 4 steps of 30 seconds are left.
    assert describe(rows, evaluations, 6).splitlines() == [
        "step 2 of 6  30.0 s per step  2.0 min left",
        "held-out accuracy  12.5% (step 0)",
        "",
        "              last  mean of 10",
        "-------  --  -----  ----------",
        "plain    ▁█  0.500       0.375",
        "seconds  ▁▁   30.0        30.0",
        "",
        "seconds  update 20.00  data 1.00",
        "slowest rank 3, 25% longer than the median rank",
        "policy/skipped_updates: 1 in 2 steps",
    ]
    assert describe([], [], 6) == "no step yet"
    assert describe([{"step": 5}], [], None).startswith("step 5  nan s per step")


@pytest.mark.medium
def test_the_tool_ends_with_the_run(tmp_path: Path) -> None:
    simulate_run(tmp_path, num_steps=3)
    shown = run_python("tools/show_run.py", str(tmp_path), "--watch", "0.1")
    assert shown.returncode == 0, shown.stderr
    assert "step 3 of 3" in shown.stdout
    assert "\x1b" not in shown.stdout

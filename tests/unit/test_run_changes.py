"""A run that goes on with other values, by consent: they hold from then on and are recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import load_tool
from zppo_mm.config.load import load_config
from zppo_mm.errors import CheckpointError
from zppo_mm.parallel import groups as parallel
from zppo_mm.report.page import write_report
from zppo_mm.run.build import build_run
from zppo_mm.run.parts import Run
from zppo_mm.run.resume import resume
from zppo_mm.train import folder_of, train_steps

pytestmark = pytest.mark.medium
OPTIONS = (
    "name=run",
    "method=grpo",
    "modality=text",
    "train.train_iters=2",
    "train.num_new_questions=4",
    "train.updates_per_step=1",
    "train.lr=1e-3",
    "rollout.num_rollouts=4",
    "rollout.max_response_tokens=16",
    "evaluation.num_questions=1",
    "observability.report=false",
    "observability.trackers=[]",
    "parity.mode=none",
    "checkpoint.interval=1",
)


@contextmanager
def built(tmp_path: Path, *options: str) -> Iterator[Run]:
    config = load_config(None, [f"output_dir={tmp_path}", *OPTIONS, *options])
    parallel.initialize(config.parallel, config.seed)
    run = build_run(config)
    try:
        yield run
    finally:
        run.close()
        parallel.shutdown()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_other_values_hold_from_the_resume_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with built(tmp_path) as run:
        folder = folder_of(run.config)
        train_steps(run, folder)
        assert lines(folder.changes) == [] if folder.changes.exists() else True
    other = ("train.lr=1e-4", "rollout.num_rollouts=6", "train.train_iters=3")
    consent = "checkpoint.allow_changes=[train.lr,rollout]"
    with built(tmp_path, *other) as run, pytest.raises(CheckpointError, match=r"train\.lr was 0"):
        resume(run, folder)
    with built(tmp_path, *other, consent) as run:
        train_steps(run, folder)
        changes = [
            {"step": 2, "key": "rollout.num_rollouts", "old": 4, "new": 6},
            {"step": 2, "key": "train.lr", "old": 1e-3, "new": 1e-4},
        ]
        assert lines(folder.changes) == changes
        assert [row["policy/lr"] for row in lines(folder.metrics)] == [1e-3, 1e-3, 1e-4]
        groups = lines(folder.transcript_of(3))
        assert {len(group["rollouts"]) for group in groups} == {6}
        assert load_config(folder.config).train.lr == 1e-4
        # Its own checkpoint has the new values: nothing changes, and the record stays.
        assert resume(run, folder) == 3
        assert lines(folder.changes) == changes
    page = write_report(folder.path).read_text()
    assert "train.lr 0.001 → 0.0001" in page
    monkeypatch.setattr("sys.argv", ["show_run", str(folder)])
    load_tool("show_run").main()
    assert "rollout.num_rollouts 4 → 6" in capsys.readouterr().out


def test_a_change_that_no_step_kept_is_not_recorded(tmp_path: Path) -> None:
    allow = "checkpoint.allow_changes=[train]"
    with built(tmp_path, "train.train_iters=1") as run:
        folder = folder_of(run.config)
        train_steps(run, folder)
    for lr in (5e-4, 2e-4):
        with built(tmp_path, f"train.lr={lr}", allow) as run:
            assert resume(run, folder) == 1  # and killed before a checkpoint
        assert [row["new"] for row in lines(folder.changes)] == [lr]
    with built(tmp_path) as run:
        assert resume(run, folder) == 1
    assert lines(folder.changes) == []

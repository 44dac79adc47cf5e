"""Which keys may change between two parts of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from zppo_mm.config.load import load_config
from zppo_mm.errors import CheckpointError
from zppo_mm.run.resume import check_same_run

TEACHER = "{endpoints: ['http://a/v1'], model: large}"
WHERE = Path("runs/one")


def saved(*overrides: str) -> dict[str, Any]:
    return asdict(load_config(None, overrides))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("teacher.max_concurrency=4", "teacher.max_concurrency=8"),
        (
            f"fallback_teachers=[{TEACHER}]",
            "fallback_teachers=[{endpoints: ['http://b/v1'], model: large, on_failure: ncq_only}]",
        ),
        ("train.train_iters=3", "train.train_iters=9"),
        # A copy of a run's folder is continued under another name.
        ("name=one", "name=two"),
    ],
)
def test_where_and_how_long_may_change(before: str, after: str) -> None:
    check_same_run(load_config(None, [after]), saved(before), WHERE)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (
            f"fallback_teachers=[{TEACHER}]",
            "fallback_teachers=[{endpoints: ['http://a/v1'], model: small}]",
            "fallback_teachers.0.model",
        ),
        (
            f"fallback_teachers=[{TEACHER}]",
            "fallback_teachers=[]",
            "fallback_teachers.count was 1, is 0",
        ),
        ("data.train=[{path: x}]", "data.train=[{path: y}]", "data.train.0.path was 'x', is 'y'"),
        ("zone.tau=0.5", "zone.tau=0.4", "zone.tau was 0.5, is 0.4"),
    ],
)
def test_what_a_step_means_may_not(before: str, after: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        check_same_run(load_config(None, [after]), saved(before), WHERE)


def test_a_checkpoint_that_is_older_than_a_key_was_made_with_its_default() -> None:
    older = saved("method=grpo")
    del older["algorithm"]["importance_cap"], older["zone"]["inject"], older["distill"]
    check_same_run(load_config(None, ["method=grpo"]), older, WHERE)
    for changed, named in (
        ("algorithm.importance_cap=2", "importance_cap was 0.0"),
        ("zone.inject=true", "zone.inject was False"),
    ):
        with pytest.raises(CheckpointError, match=named):
            check_same_run(load_config(None, ["method=grpo", changed]), older, WHERE)

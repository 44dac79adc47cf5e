"""Which checkpoint of a run an export takes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from zppo_mm.conversion.choosing import choose_checkpoint
from zppo_mm.conversion.exporting import find_weights
from zppo_mm.errors import CheckpointError, ModelError
from zppo_mm.observability.sinks import append_line
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint_files import folder_of_step
from zppo_mm.weights.imported_folder import HEADERS_FOLDER, SOURCE_FOLDER


def run_with(tmp_path: Path, checkpoints: list[int], accuracies: dict[int, float]) -> RunFolder:
    run = RunFolder(tmp_path)
    for step in checkpoints:
        folder_of_step(run.checkpoints, step).mkdir(parents=True)
    for step, accuracy in accuracies.items():
        append_line(run.evaluations, {"step": step, "accuracy": accuracy})
    return run


def test_the_newest_one_of_a_step_and_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = run_with(
        tmp_path, [30, 40, 50, 60], {20: 0.9, 30: 0.3, 40: 0.6, 50: float("nan"), 60: 0.6}
    )
    assert choose_checkpoint(run, "newest").name == "step_000060"
    assert choose_checkpoint(run, 30).name == "step_000030"
    assert not caplog.messages
    # The earlier of equals; one without an accuracy is none.
    assert choose_checkpoint(run, "best").name == "step_000040"
    assert caplog.messages == [
        "step 40 has the best held-out accuracy, 0.6000, of the checkpoints after step 30, step "
        "40, step 60",
        "step 20 was better, 0.9000, but has no checkpoint; raise checkpoint.keep in later runs",
    ]


def test_before_training_there_is_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choose_checkpoint(run_with(tmp_path, [10], {0: 0.9, 10: 0.5}), "best")
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == [
        "step 0 was better, 0.9000, but has no checkpoint; it is the student itself"
    ]


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path, [30, 40], {0: 0.2, 20: 0.5})
    with pytest.raises(
        CheckpointError, match=r"step_000020: no such checkpoint, .*one of step 30, step 40;"
    ):
        choose_checkpoint(run, 20)
    with pytest.raises(
        CheckpointError,
        match="after step 30, step 40 and evaluations after step 0, step 20, expected a step",
    ):
        choose_checkpoint(run, "best")
    run.evaluations.unlink()
    with pytest.raises(CheckpointError, match="evaluations after no step"):
        choose_checkpoint(run, "best")
    for choice in ("newest", "best"):
        with pytest.raises(CheckpointError, match="the run has no checkpoint"):
            choose_checkpoint(RunFolder(tmp_path / "none"), choice)


def test_an_imported_folder_has_no_steps(tmp_path: Path) -> None:
    for name in (HEADERS_FOLDER, SOURCE_FOLDER):
        (tmp_path / name).mkdir()
    with pytest.raises(ModelError, match="no run, got an imported folder, which has no steps"):
        find_weights(tmp_path, 20)

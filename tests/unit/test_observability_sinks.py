"""Sinks: complete lines, no step twice after a resume, one console line per step."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from zppo_mm.config.schema import ObservabilityConfig
from zppo_mm.observability.logs import configure_logging
from zppo_mm.observability.sinks import (
    JsonLinesSink,
    MetricsLog,
    append_evaluation,
    open_metrics_log,
    truncate_after,
)
from zppo_mm.observability.trackers import Trackers
from zppo_mm.run_folder import RunFolder


@dataclass
class Evaluation:
    step: int
    accuracy: float


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_leaves_no_step_twice(tmp_path: Path) -> None:
    config = ObservabilityConfig(trackers=[], progress_bar=False)
    log = open_metrics_log(config, RunFolder(tmp_path), train_iters=5, last_step=0)
    append_evaluation(RunFolder(tmp_path), Evaluation(0, 0.1))
    for step in (1, 2, 3):
        log.write(step, {"policy/loss": float(step)})
    append_evaluation(RunFolder(tmp_path), Evaluation(3, 0.2))
    # Killed while step 4 was being written; the checkpoint holds step 2.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "policy/lo')
    log = open_metrics_log(config, RunFolder(tmp_path), train_iters=5, last_step=2)
    for step in (3, 4):
        log.write(step, {"policy/loss": -float(step)})
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps(tmp_path / "evaluation.jsonl") == [0]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2]) == {
        "step": 3,
        "policy/loss": -3.0,
    }


def test_lines_that_are_no_records_end_no_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = [
        b"5",
        b"[]",
        b"null",
        b"{}",
        b'{"step": "1"}',
        b"\xff\xfe",
        b"\0" * 20,
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join([b'{"step": 1}', *damaged, b'{"step": 2}', b'{"step": 3}', b""]))
    truncate_after(path, 2)
    assert steps(path) == [1, 2]
    assert len(caplog.records) == len(damaged)


def test_truncating_a_missing_file_makes_none(tmp_path: Path) -> None:
    truncate_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "metrics.jsonl", last_step=0)
    sink.write(
        1, {"policy/loss": float("nan"), "policy/grad_norm": float("inf"), "policy/lr": 1e-6}
    )
    assert (
        (tmp_path / "metrics.jsonl").read_text()
        == '{"step": 1, "policy/loss": null, "policy/grad_norm": null, "policy/lr": 1e-06}\n'
    )


def test_tensorboard_holds_every_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = ObservabilityConfig(progress_bar=False)
    log = open_metrics_log(config, RunFolder(tmp_path), train_iters=4, last_step=0)
    for step in (1, 2, 3):
        log.write(step, {"policy/loss": float(step)})
    log.close()
    log = open_metrics_log(config, RunFolder(tmp_path), train_iters=4, last_step=1)
    for step in (2, 3, 4):
        log.write(step, {"policy/loss": -float(step)})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("policy/loss")] == [
        (1, 1.0),
        (2, -2.0),
        (3, -3.0),
        (4, -4.0),
    ]


def test_console_says_one_line_per_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_metrics_log(
        ObservabilityConfig(trackers=[], progress_bar=False),
        RunFolder(tmp_path),
        train_iters=9,
        last_step=0,
    )
    with caplog.at_level(logging.INFO):
        log.write(3, {"accuracy/plain": 0.4375, "buffer/size": 12.0, "policy/loss": -0.01234})
        log.write(4, {"policy/loss": float("nan")})
    log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 3/9  plain 0.438  buffer 12  loss -0.0123",
        "step 4/9  loss nan",
    ]


def test_every_sink_is_closed_when_one_fails() -> None:
    class Sink:
        def __init__(self, fails: bool) -> None:
            self.fails, self.closed = fails, False

        def write(self, step: int, values: object) -> None: ...

        def close(self) -> None:
            self.closed = True
            if self.fails:
                raise OSError("disk full")

    sinks = (Sink(True), Sink(False))
    with pytest.raises(ExceptionGroup, match="some sinks did not close"):
        MetricsLog(sinks, Trackers({})).close()
    assert sinks[1].closed


@pytest.mark.parametrize(
    ("rank", "shown"), [(0, ["I first", "W second"]), (1, ["[rank 1] W second"])]
)
def test_ranks_other_than_the_first_show_warnings_only(
    rank: int, shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    try:
        configure_logging(tmp_path / "run.log", rank)
        logging.getLogger("zppo_mm.probe").info("first")
        logging.getLogger("zppo_mm.probe").warning("second")
    finally:
        for handler in set(root.handlers) - set(before[0]):
            handler.close()
        root.handlers, root.level = before
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == shown
    assert (tmp_path / "run.log").exists() == (rank == 0)

"""Traces: of the steps that are named and those that are asked for, and never the end of a run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.observability.rank_times import PhaseMetrics
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.profiler import StepProfiler
from zppo_mm.run_folder import RunFolder


@pytest.fixture(autouse=True)
def one_rank() -> Iterable[None]:
    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shutdown()


def steps(profiler: StepProfiler, *numbers: int) -> None:
    for number in numbers:
        metrics = PhaseMetrics(mark=torch.profiler.record_function)
        with profiler.step(number), metrics.phase("update"):
            torch.ones(3, 3) @ torch.ones(3, 3)


def traced(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.profiles.glob("step_*"))


def test_named_steps_are_traced_with_their_phases(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    steps(StepProfiler([2, 4], folder), 1, 2, 3, 4, 5)
    assert traced(folder) == [2, 4]
    with gzip.open(folder.profile_of(2, rank=0), "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"update", "aten::mm"} <= names
    assert [path.name for path in folder.profile_of(2, 0).parent.iterdir()] == ["rank_0000.json.gz"]


@pytest.mark.parametrize(("text", "expected"), [("", [2]), ("3\n", [2, 3, 4]), ("now", [2])])
def test_a_file_asks_for_traces(text: str, expected: list[int], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    profiler = StepProfiler([], folder)
    steps(profiler, 1)
    folder.profile_request.write_text(text)
    steps(profiler, 2, 3, 4, 5)
    assert traced(folder) == expected
    assert not folder.profile_request.exists()


def test_a_trace_that_cannot_be_written_is_counted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.profiles.write_text("a file")
    profiler = StepProfiler([1], folder)
    steps(profiler, 1, 2)
    assert profiler.take_failures().values() == {"tracking/failures/profiler": 1.0}
    assert profiler.take_failures().values() == {}


def test_a_request_that_cannot_be_taken_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.profile_request.mkdir()
    steps(StepProfiler([], folder), 1)
    assert traced(folder) == []
    assert "the request for a trace cannot be taken" in caplog.text


def test_an_error_of_the_step_comes_through(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    profiler = StepProfiler([1], folder)
    with pytest.raises(KeyError), profiler.step(1):
        raise KeyError
    assert traced(folder) == []
    steps(profiler, 1)
    assert traced(folder) == [1]

"""Trackers: what they show, and that none of them can end a run."""

from __future__ import annotations

import json
import logging
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from data.errors import DataError
from data.question import MediaRef
from tests.support.simulated_run import make_group, make_question, make_rollout
from zppo_mm.config.monitoring import ObservabilityConfig
from zppo_mm.errors import ConfigError
from zppo_mm.observability.prometheus import PrometheusEndpoint, exposition
from zppo_mm.observability.samples import (
    FRAME_PIXELS,
    MAX_FRAMES,
    Sample,
    make_samples,
    side_by_side,
)
from zppo_mm.observability.sinks import JsonLinesSink, MetricsLog, open_metrics_log
from zppo_mm.observability.trackers import SwanLab, Tracker, Trackers, Wandb, open_trackers
from zppo_mm.run_folder import RunFolder

SAMPLES = [
    Sample("new, accuracy 0.50, q1", "**Prompt**\n\n    2 + 2?", None),
    Sample("bcq, accuracy 1.00, q2", "**Prompt**\n\n    3 + 3?", np.full((4, 9, 3), 77, np.uint8)),
]


class Recorder:
    """Keeps what it is given, or fails."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls: list[tuple[str, int]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._call("write", step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._call("samples", step)

    def close(self) -> None:
        self._call("close", 0)

    def _call(self, name: str, step: int) -> None:
        if self.fails:
            raise OSError("no connection")
        self.calls.append((name, step))


def unreachable() -> Tracker:
    raise TimeoutError("no answer")


def test_failures_are_counted_and_end_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, whole = tmp_path / "metrics.jsonl", Recorder()
    trackers = Trackers(
        {"broken": lambda: Recorder(fails=True), "lost": unreachable, "whole": lambda: whole}
    )
    log = MetricsLog((JsonLinesSink(path, last_step=0),), trackers)
    with caplog.at_level(logging.ERROR):
        for step in (1, 2):
            log.write(step, {"policy/loss": 0.5})
            log.write_samples(step, lambda: SAMPLES)
        log.write(3, {"policy/loss": 0.5})
        log.close()
    assert whole.calls == [
        ("write", 1),
        ("samples", 1),
        ("write", 2),
        ("samples", 2),
        ("write", 3),
        ("close", 0),
    ]
    failures = [
        {
            name.removeprefix("tracking/failures/"): value
            for name, value in json.loads(line).items()
            if name.startswith("tracking/")
        }
        for line in path.read_text().splitlines()
    ]
    # The one that did not open is gone; the other failed twice in each step.
    assert failures == [{"lost": 1.0}, {"broken": 2.0}, {"broken": 2.0}]
    assert [record.getMessage() for record in caplog.records] == [
        f"tracker {name}: a call failed, the run goes on without it" for name in ("lost", "broken")
    ]


def test_samples_that_cannot_be_made_are_counted() -> None:
    def fail() -> list[Sample]:
        raise ValueError("no picture")

    whole = Recorder()
    trackers = Trackers({"whole": lambda: whole})
    trackers.write_samples(1, fail)
    trackers.write_samples(2, list)
    assert whole.calls == []
    assert trackers.take_failures() == {"tracking/failures/samples": 1.0}
    assert trackers.take_failures() == {}


def test_samples_are_not_made_for_nobody() -> None:
    made: list[int] = []
    Trackers({}).write_samples(1, lambda: made.append(1) or SAMPLES)  # type: ignore[func-returns-value]
    assert made == []


def test_tensorboard_shows_texts_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(ObservabilityConfig(), RunFolder(tmp_path), last_step=0)
    trackers.write(1, {"policy/loss": 0.25})
    trackers.write_samples(1, lambda: SAMPLES)
    trackers.close()
    assert trackers.take_failures() == {}
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("policy/loss")] == [(1, 0.25)]
    assert events.Tags()["images"] == ["samples/2/media"]
    (picture,) = events.Images("samples/2/media")
    assert (picture.step, picture.width, picture.height) == (1, 9, 4)
    texts = [
        events.Tensors(f"samples/{n}/text_summary")[0].tensor_proto.string_val[0].decode()
        for n in (1, 2)
    ]
    assert texts == [f"{sample.title}\n\n{sample.text}" for sample in SAMPLES]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_missing_package_is_a_clear_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError,
        match=rf"observability\.trackers: {name} cannot be imported, got .* the `{name}` extra",
    ):
        open_metrics_log(
            ObservabilityConfig(trackers=[name]), RunFolder(tmp_path), train_iters=1, last_step=0
        )


@pytest.mark.parametrize(("name", "kind"), [("wandb", Wandb), ("swanlab", SwanLab)])
def test_offline_trackers_take_numbers_texts_and_pictures(
    name: str, kind: type[Wandb] | type[SwanLab], tmp_path: Path
) -> None:
    package = pytest.importorskip(name)
    folder = tmp_path / "run-1"
    folder.mkdir()
    tracker = kind(package, "zppo-tests", True, folder)
    for step in (1, 2):
        tracker.write(step, {"policy/loss": 0.5 / step})
        picture = np.full((4, 9, 3), 40 * step, np.uint8)
        tracker.write_samples(step, [SAMPLES[0], Sample("bcq", "text", picture)])
    tracker.close()
    written = [path for path in folder.rglob("*") if path.is_file()]
    # One picture per step, which nobody has uploaded.
    assert len([path for path in written if path.suffix == ".png"]) == 2


@pytest.mark.parametrize("kind", [Wandb, SwanLab])
def test_a_restarted_run_is_another_run_and_a_resumed_one_is_not(
    kind: type[Wandb] | type[SwanLab], tmp_path: Path
) -> None:
    opened: list[dict[str, object]] = []
    package = ModuleType("tracker")
    package.__dict__["init"] = lambda **given: opened.append(given)
    folder = RunFolder(tmp_path / "run")
    for number in range(3):
        for _ in ("started", "resumed"):
            kind(package, "zppo-tests", True, folder.path)
        next(islice(folder.earlier_records(), number, None)).mkdir(parents=True)
    assert [each["id"] for each in opened] == [
        *["run"] * 2,
        *["run-2"] * 2,
        *["run-3"] * 2,
    ]
    assert [each["name"] for each in opened] == [each["id"] for each in opened]


def test_prometheus_reads_the_newest_step() -> None:
    endpoint = PrometheusEndpoint("127.0.0.1", 0, "demo")
    address = f"http://127.0.0.1:{endpoint.port}"
    try:
        endpoint.write(1, {"policy/loss": 0.5})
        endpoint.write(2, {"policy/loss": 0.25, "policy/lr": 1e-6})
        with urllib.request.urlopen(f"{address}/metrics", timeout=30) as reply:
            assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            page = reply.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/etc/passwd", timeout=30)
    finally:
        endpoint.close()
    assert page.splitlines() == [
        "# TYPE zppo_step gauge",
        'zppo_step{run="demo"} 2.0',
        "# TYPE zppo_policy_loss gauge",
        'zppo_policy_loss{run="demo"} 0.25',
        "# TYPE zppo_policy_lr gauge",
        'zppo_policy_lr{run="demo"} 1e-06',
    ]


def test_names_and_numbers_fit_prometheus() -> None:
    page = exposition('a"b\\', 1, {"teacher/faults/http_503": float("nan"), "x/y-z": float("inf")})
    assert page.splitlines()[3] == r'zppo_teacher_faults_http_503{run="a\"b\\"} NaN'
    assert page.splitlines()[5] == r'zppo_x_y_z{run="a\"b\\"} +Inf'


def test_a_taken_port_ends_no_run(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ObservabilityConfig(trackers=[], prometheus_port=port)
        trackers = open_trackers(config, RunFolder(tmp_path), last_step=0)
    assert trackers.take_failures() == {"tracking/failures/prometheus": 1.0}


def open_media(ref: MediaRef) -> npt.NDArray[np.uint8]:
    if ref.key == "gone":
        raise DataError("gone: not there")
    return np.full((12 if ref.kind == "video" else 1, 20, 30, 3), 90, np.uint8)


def test_samples_are_one_group_of_every_kind_first() -> None:
    media = (MediaRef("video", "a.tar", "clip", "mp4"), MediaRef("image", "a.tar", "x", "png"))
    unequal = [make_rollout("1", 0.0), make_rollout("2", 1.0), make_rollout("3", 0.0)]
    groups = [
        make_group(make_question(1), "new", [make_rollout("5", 0.0)] * 2),
        make_group(make_question(2, media), "new", unequal, text="<b>look</b>"),
        make_group(make_question(3), "bcq", unequal),
    ]
    samples = make_samples(groups, 2, open_media)
    ids = [make_question(index).id for index in (2, 3)]
    assert [sample.title for sample in samples] == [
        f"new, accuracy 0.33, {ids[0]}",
        f"bcq, accuracy 0.33, {ids[1]}",
    ]
    first, second = samples
    assert "    <b>look</b>" in first.text
    assert first.text.index("reward 1.00") < first.text.index("reward 0.00")
    assert first.text.count("**Response") == 2
    # Four of the clip's frames and the picture, 30 pixels each.
    assert first.picture is not None
    assert first.picture.shape == (20, (MAX_FRAMES + 1) * 30, 3)
    assert second.picture is None
    assert len(make_samples(groups, 9, open_media)) == 3
    assert make_samples(groups, 0, open_media) == []


def test_media_that_cannot_be_opened_is_named_in_the_sample() -> None:
    question = make_question(1, (MediaRef("image", "a.tar", "gone", "png"),))
    (sample,) = make_samples([make_group(question, "new", [make_rollout("1", 1.0)])], 1, open_media)
    assert sample.picture is None
    assert sample.text.endswith("Media not shown: gone: not there")


def test_pictures_stand_side_by_side() -> None:
    wide = np.full((1, 100, 10 * FRAME_PIXELS, 3), 50, np.uint8)
    small = np.full((1, 60, 8, 3), 200, np.uint8)
    row = side_by_side([wide, small])
    # 100 pixels of height become 10; the other keeps its 60.
    assert row.shape == (60, FRAME_PIXELS + 8, 3)
    assert (row[:, FRAME_PIXELS:] == 200).all()
    assert (row[:9, :FRAME_PIXELS] == 50).all()
    assert (row[11:, :FRAME_PIXELS] == 0).all()

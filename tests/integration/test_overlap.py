"""Plain rollouts that are sampled while the step before trains: by which weights, and that a run
which is interrupted anywhere ends as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.copied_engine import CopiedEngine
from tests.support.running import SMALL, buffer, lines, transcript
from zppo_mm.config.load import load_config
from zppo_mm.errors import GradingError
from zppo_mm.experience import Advantages, Group
from zppo_mm.interruption import Interruption, RunStopped
from zppo_mm.observability.metrics import StepMetrics
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.build import build_overlap, build_run, student_folder
from zppo_mm.run.parts import Run
from zppo_mm.run.shared import load_model
from zppo_mm.run_folder import RunFolder
from zppo_mm.stages.round import plain_prompts
from zppo_mm.stages.stages import Learner
from zppo_mm.train import train_steps
from zppo_mm.zone.plain_schedule import PlainSchedule

STEPS = 3
TOKENS_BEFORE_UPDATE = 5
OPTIONS = (
    *SMALL,
    "modality=text",
    f"train.train_iters={STEPS}",
    "train.num_new_questions=4",
    "train.lr=3e-3",  # so that every step samples other texts
    "rollout.max_response_tokens=24",
    "evaluation.num_questions=2",
    "evaluation.interval=2",
    "parity.mode=none",
    "observability.report=false",
    "checkpoint.interval=100",
    "algorithm.importance_cap=2",
)


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    config = load_config(None, OPTIONS)
    parallel.initialize(config.parallel, config.seed)
    yield
    parallel.shutdown()


@dataclass
class Noticed:
    """A learner that says when it begins."""

    learner: Learner
    engine: CopiedEngine

    def learn(
        self, groups: Sequence[Group], advantages: Advantages, step: int, metrics: StepMetrics
    ) -> dict[str, tuple[int, ...]]:
        self.engine.notify("learn")
        return self.learner.learn(groups, advantages, step, metrics)


@dataclass
class Started:
    """A run with an engine of its own."""

    run: Run
    engine: CopiedEngine
    trained_sampler: GroupSampler
    interruption: Interruption
    folder: RunFolder

    def to_its_end(self) -> Path:
        try:
            train_steps(self.run, self.folder)
        finally:
            self.run.close()
        return self.folder.path

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.run.policy.model.parameters()]


def start(
    output_dir: Path, max_staleness: int = 1, partial: bool = False, wave: int = 0
) -> Started:
    """Build a run; what the configuration refuses without servers is set afterwards."""
    config = load_config(None, OPTIONS)
    interruption = Interruption()
    interruption.limit(config.train.stop_within_seconds, 0)
    run = build_run(config, interruption=interruption)
    copied = load_model(
        config.model, config.parallel, student_folder(config.model), trainable=False
    )
    tokens = TOKENS_BEFORE_UPDATE if partial else 0
    engine = CopiedEngine(run.policy.model, copied, config.seed, tokens)
    exchange = ParallelExchange(None, interruption.is_due)
    sampler = GroupSampler(engine, run.encoder, run.verifier, exchange)
    rollout = dataclasses.replace(
        config.rollout, max_staleness=max_staleness, partial_rollouts=partial
    )
    config = dataclasses.replace(config, rollout=rollout)
    overlap = build_overlap(config, sampler, run.stream, exchange, interruption)
    update = engine.update_weights
    trained_sampler = run.evaluation_sampler
    stages = dataclasses.replace(
        run.stages,
        sampler=sampler,
        learner=Noticed(run.stages.learner, engine),
        schedule=PlainSchedule(config.seed, wave, parallel.num_replicas()),
        overlap=overlap,
        update_weights=overlap.before_update(update) if overlap else update,
    )
    run = dataclasses.replace(run, config=config, stages=stages, evaluation_sampler=sampler)
    return Started(run, engine, trained_sampler, interruption, RunFolder(output_dir))


@dataclass
class Whole:
    """A run that nothing interrupted."""

    path: Path
    weights: list[torch.Tensor]
    events: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    started = start(tmp_path_factory.mktemp("whole"))
    events: list[str] = []
    started.engine.notify = events.append
    return Whole(started.to_its_end(), started.weights(), events)


def records(path: Path) -> list[Any]:
    """Return transcripts, buffer files and evaluations."""
    return [
        *(transcript(path, step) for step in range(1, STEPS + 1)),
        *(buffer(path, step) for step in range(1, STEPS + 1)),
        lines(path / "evaluation.jsonl"),
    ]


def assert_same(started: Started, whole: Whole) -> None:
    """Go on to the end, and compare everything with a run that was never interrupted."""
    assert records(started.to_its_end()) == records(whole.path)
    for mine, its in zip(started.weights(), whole.weights, strict=True):
        assert torch.equal(mine, its)
    metrics = lines(started.folder.metrics)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    for name in ("data/samples", "policy/loss", "rollout/staleness"):
        theirs = lines(whole.path / "metrics.jsonl")
        assert [row[name] for row in metrics] == [row[name] for row in theirs]


def plain(path: Path, step: int) -> dict[str, list[str]]:
    """Return the responses to the plain prompts of a step."""
    return {
        group["uid"]: [rollout["text"] for rollout in group["rollouts"]]
        for group in transcript(path, step)
        if group["kind"] in ("new", "replayed")
    }


def versions(path: Path, step: int) -> dict[str, set[int]]:
    """Return the weights that sampled, by kind of group."""
    found: dict[str, set[int]] = {}
    for group in transcript(path, step):
        of_kind = found.setdefault(group["kind"], set())
        of_kind |= {rollout["policy_version"] for rollout in group["rollouts"]}
    return found


def test_plain_rollouts_are_of_the_weights_before_and_all_others_of_the_present(
    whole: Whole,
) -> None:
    for step in range(1, STEPS + 1):
        for kind, found in versions(whole.path, step).items():
            is_plain = kind in ("new", "replayed")
            assert found == {step - 1 if is_plain and step > 1 else step}, (step, kind)
    assert set(versions(whole.path, 2)) > {"new", "replayed"}, "of every sort there are some"
    for row in lines(whole.path / "metrics.jsonl"):
        tokens = Counter[bool]()
        for group in transcript(whole.path, row["step"]):
            for rollout in group["rollouts"]:
                tokens[rollout["policy_version"] < row["step"]] += rollout["num_tokens"]
        assert row["rollout/staleness"] == pytest.approx(tokens[True] / tokens.total())
        assert ("rollout/overlapped" in row) == (row["step"] > 1)
        assert 0 <= row.get("rollout/overlapped", 0) <= 1


def test_they_are_what_those_weights_sample(whole: Whole, tmp_path: Path) -> None:
    """The trained network of before the first step samples the questions of the second."""
    started = start(tmp_path, max_staleness=0)
    stages = started.run.stages
    questions = [stages.feed.take(stages.num_new_questions) for _ in (1, 2)][1]
    groups = started.trained_sampler.sample(
        plain_prompts(stages, questions, [], 2, 0), stages.sampling, stages.num_rollouts, 2
    )
    started.run.close()
    expected = {group.uid: [rollout.text for rollout in group.rollouts] for group in groups}
    found = plain(whole.path, 2)
    assert {uid: found[uid] for uid in expected} == expected


def test_without_overlap_an_engine_elsewhere_changes_nothing(tmp_path: Path) -> None:
    elsewhere = start(tmp_path / "elsewhere", max_staleness=0)
    embedded = start(tmp_path / "embedded", max_staleness=0)
    stages = dataclasses.replace(
        embedded.run.stages, sampler=embedded.trained_sampler, update_weights=lambda version: None
    )
    embedded.run = dataclasses.replace(
        embedded.run, stages=stages, evaluation_sampler=embedded.trained_sampler
    )
    assert records(elsewhere.to_its_end()) == records(embedded.to_its_end())
    for one, other in zip(elsewhere.weights(), embedded.weights(), strict=True):
        assert torch.equal(one, other)
    assert "rollout/staleness" not in lines(elsewhere.folder.metrics)[0]


def test_waves_change_no_rollout(whole: Whole, tmp_path: Path) -> None:
    path = start(tmp_path, wave=1).to_its_end()
    assert transcript(path, 1) == transcript(whole.path, 1)
    # The weights after the first update may be rounded otherwise.
    assert plain(path, 2) == plain(whole.path, 2)


EVENTS = (
    *("update", "start", "wait"),  # the first evaluation
    *(
        "start",
        "wait",
        "start",
        "wait",
        "start",
        "learn",
    ),  # step 1: plain, reformulated, next plain
    *("wait", "update", "start", "wait", "start", "learn"),  # step 2, without plain ones of its own
    *("wait", "update", "start", "wait"),  # its evaluation
    *("start", "wait", "learn"),  # step 3
    *("update", "start", "wait"),  # the last evaluation
)
QUICK = (9, 12, 14, 16)
"""Of every sort one; before the fourth nothing is under way that a signal could not end at once."""


def test_the_events_are_those_that_are_interrupted(whole: Whole) -> None:
    assert tuple(whole.events) == EVENTS


def interrupt(tmp_path: Path, at: int, num_stops: int = 0) -> int:
    """Ask a run to end at an event; returns the step that it has a checkpoint of."""
    started, events = start(tmp_path), []

    def notify(event: str) -> None:
        events.append(event)
        if len(events) == at:
            started.interruption.request("asked")
            started.engine.num_stops = num_stops

    started.engine.notify = notify
    with pytest.raises(RunStopped) as stopped:
        started.to_its_end()
    return stopped.value.step


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(at, marks=() if at in QUICK else pytest.mark.slow)
        for at in range(4, len(EVENTS) + 1)
    ],
)
def test_interrupted_anywhere_it_ends_the_same(whole: Whole, tmp_path: Path, at: int) -> None:
    step = interrupt(tmp_path, at)
    # Once the next step is under way, a step is finished.
    is_late = EVENTS[at - 1 : at + 1] == ("start", "learn")
    assert step == EVENTS[:at].count("learn") + is_late
    assert_same(start(tmp_path), whole)


def test_dropped_for_another_reason_it_goes_on_the_same(whole: Whole, tmp_path: Path) -> None:
    started = start(tmp_path)
    replies = iter([True, True, False])  # step 1, its evaluation, step 2

    def check_grading() -> None:
        if not next(replies):
            raise GradingError("no verdicts")

    stages = dataclasses.replace(started.run.stages, check_grading=check_grading)
    started.run = dataclasses.replace(started.run, stages=stages)
    with pytest.raises(GradingError):
        started.to_its_end()
    assert_same(start(tmp_path), whole)


def test_what_does_not_come_in_time_is_sampled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = EVENTS.index("learn") + 2
    assert EVENTS[at - 1] == "wait"
    assert interrupt(tmp_path, at, num_stops=1) == 1
    assert "step 2: its plain rollouts are left out of the checkpoint" in caplog.text
    assert "(the run is to end)" in caplog.text
    resumed = start(tmp_path).to_its_end()
    assert versions(resumed, 2)["new"] == {2}
    assert versions(resumed, 3)["new"] == {2}
    assert lines(resumed / "metrics.jsonl")[1]["rollout/staleness"] == 0


def test_partial_rollouts_go_on_with_the_new_weights(tmp_path: Path) -> None:
    path = start(tmp_path, partial=True).to_its_end()
    rollouts = [rollout for group in transcript(path, 2) for rollout in group["rollouts"]]
    spans = [rollout["versions"] for rollout in rollouts if "versions" in rollout]
    assert {(first, num_tokens, last) for (first, num_tokens), (last, _) in spans} == {
        (1, TOKENS_BEFORE_UPDATE, 2)
    }
    assert versions(path, 2)["new"] == {1}, "that of the first tokens"
    behind = [
        rollout["versions"][0][1]
        if "versions" in rollout
        else rollout["num_tokens"] * (2 - rollout["policy_version"])
        for rollout in rollouts
    ]
    num_tokens = sum(rollout["num_tokens"] for rollout in rollouts)
    row = lines(path / "metrics.jsonl")[1]
    assert row["rollout/staleness"] == pytest.approx(sum(behind) / num_tokens)
    assert row["policy/importance"] != 1

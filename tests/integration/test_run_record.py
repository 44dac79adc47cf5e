"""From transcripts and buffer files alone, every advantage, cap and buffer decision of a run is
computed again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.running import buffer, lines, run, transcript

STEPS = 8
NUM_NEW = 8
TAU = 0.5
RHO_AUG = 0.5
RHO_REPLAY = 0.25
# Advantages are written from float32.
ADVANTAGE_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(
        tmp_path_factory.mktemp("runs"),
        "zppo",
        "modality=mixed",
        f"train.train_iters={STEPS}",
        "observability.trackers=[tensorboard]",
        "observability.tracked_samples_interval=4",
        "observability.profile_steps=[2]",
        processes=2,
    )


def plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["kind"] in ("new", "replayed")]


def test_the_run_leaves_everything(folder: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "evaluation.jsonl",
        "report.html",
        "hf/model.safetensors",
        "hf/config.json",
        "run.log",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(folder / "evaluation.jsonl")] == [0, STEPS]


def test_both_ranks_are_measured_and_traced(folder: Path) -> None:
    phases = {"data", "plain_rollout", "teacher", "update"}
    records, rows = lines(folder / "ranks.jsonl"), lines(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record, row in zip(records, rows, strict=True):
        assert phases <= set(record["seconds"])
        for name, (first, second) in record["seconds"].items():
            # Written to the millisecond; rank 0 was in the phase no shorter than it was busy.
            assert row[f"ranks/busy_most/{name}"] == pytest.approx(max(first, second), abs=1e-3)
            assert 0 <= first <= row[f"seconds/{name}"] + 1e-3
            assert second >= 0
        assert row["ranks/slowest"] == record["slowest"]["rank"]
    assert sorted(path.name for path in (folder / "profiles" / "step_000002").iterdir()) == [
        "rank_0000.json.gz",
        "rank_0001.json.gz",
    ]


def test_samples_are_in_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert [each.step for each in events.Tensors("samples/1/text_summary")] == [1, 5]
    assert events.Tags()["images"]
    assert not any(name.startswith("tracking/") for name in events.Tags()["scalars"])


def test_advantages(folder: Path) -> None:
    for step in range(1, STEPS + 1):
        groups = transcript(folder, step)
        centred = []
        for group in groups:
            rewards = [rollout["reward"] for rollout in group["rollouts"]]
            assert group["accuracy"] == pytest.approx(sum(rewards) / len(rewards))
            centred.append(
                [reward - sum(rewards) / len(rewards) for reward in rewards]
                if len(set(rewards)) > 1
                else None
            )
        values = [value for group in centred if group for value in group]
        mean = sum(values) / max(len(values), 1)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values), 1))
        for group, expected in zip(groups, centred, strict=True):
            got = [rollout["advantage"] for rollout in group["rollouts"]]
            want = [(value - mean) / std for value in expected] if expected else [0.0] * len(got)
            assert got == pytest.approx(want, abs=ADVANTAGE_TOLERANCE)


def test_caps_and_kinds(folder: Path) -> None:
    for step in range(1, STEPS + 1):
        groups = transcript(folder, step)
        by_kind = defaultdict(list)
        for group in groups:
            by_kind[group["kind"]].append(group)
        hard = {
            group["question_id"]: group["accuracy"]
            for group in plain(groups)
            if group["accuracy"] < TAU
        }
        reformulated = by_kind["bcq"] + by_kind["ncq"]
        assert len(by_kind["new"]) == NUM_NEW
        assert len(by_kind["replayed"]) <= RHO_REPLAY * NUM_NEW
        assert len(reformulated) <= RHO_AUG * NUM_NEW
        assert len(reformulated) >= min(len(hard), RHO_AUG * NUM_NEW)
        reformulated = {group["question_id"] for group in reformulated}
        assert reformulated <= set(hard)
        # Whatever was reformulated is no easier than whatever was left out.
        left_out = [accuracy for question, accuracy in hard.items() if question not in reformulated]
        assert max((hard[question] for question in reformulated), default=0.0) <= min(
            left_out, default=1.0
        )
        solved = {
            group["question_id"] for group in plain(groups) if any(group.get("teacher_rewards", ()))
        }
        assert {
            group["question_id"] for group in plain(groups) if "teacher_rewards" in group
        } == set(hard)
        for group in by_kind["bcq"]:
            assert group["question_id"] in solved
            shown = [
                (candidate["source"], candidate["correct"]) for candidate in group["candidates"]
            ]
            assert sorted(shown) == [("student", False), ("teacher", True)]
        for group in by_kind["ncq"]:
            wrong = [
                r
                for p in plain(groups)
                if p["question_id"] == group["question_id"]
                for r in p["rollouts"]
                if r["reward"] == 0
            ]
            assert [candidate["answer"] for candidate in group["candidates"]] == [
                rollout["parsed"] for rollout in wrong
            ]


def test_buffer(folder: Path) -> None:
    content: list[str] = []
    for step in range(1, STEPS + 1):
        groups, record = transcript(folder, step), buffer(folder, step)
        accuracy = {group["question_id"]: group["accuracy"] for group in plain(groups)}
        for group in groups:
            if group["kind"] == "replayed":
                assert group["question_id"] in content
        admitted = [
            question
            for question, value in accuracy.items()
            if value < TAU and question not in content
        ]
        graduated = [
            question for question, value in accuracy.items() if value >= TAU and question in content
        ]
        content = [question for question in content if question not in graduated] + admitted
        assert record["admitted"] == admitted
        assert sorted(record["graduated"]) == sorted(graduated)
        assert record["evicted"] == []
        assert record["content"] == content


def test_the_run_met_every_kind_and_fate(folder: Path) -> None:
    # Otherwise the tests above would have nothing to look at.
    kinds = {group["kind"] for step in range(1, STEPS + 1) for group in transcript(folder, step)}
    assert kinds == {"new", "replayed", "bcq", "ncq"}
    assert any(buffer(folder, step)["graduated"] for step in range(1, STEPS + 1))


def test_every_rollout_is_used_once_in_equal_minibatches(folder: Path) -> None:
    for step in range(1, STEPS + 1):
        groups = transcript(folder, step)
        counts: dict[int, int] = defaultdict(int)
        for group in groups:
            indices = {rollout["minibatch"] for rollout in group["rollouts"]}
            assert len(indices) == 1
            counts[indices.pop()] += 1
        assert set(counts) == {0, 1}
        assert abs(counts[0] - counts[1]) <= 1

"""examples/own_reward as a user starts it: its function grades training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import CLONE, SMALL, lines, run_python, transcript
from zppo_mm.rewards.function_process import load_function, read_reward
from zppo_mm.rewards.function_source import source_digest

FUNCTION = "examples/own_reward/reward.py:box_reward"
EXAMPLE = ("--config", "examples/own_reward/run.yaml")


def run_tool(name: str, *arguments: str) -> str:
    done = run_python(str(CLONE / "tools" / f"{name}.py"), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the shards of the example, few of them."""
    folder = tmp_path_factory.mktemp("boxes")
    run_tool("make_boxes", str(folder), "--num-train", "24", "--num-held-out", "6")
    for split in ("train", "held_out"):
        shards = str(folder / split)
        run_tool("make_shards", str(folder / f"{split}.jsonl"), shards, "--answer-type", "box")
    return folder


@pytest.fixture(scope="module")
def trained(boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of the example of one step, with a rollout for every number."""
    sources = [f"data.{split}=[{{path: {boxes / split}}}]" for split in ("train", "held_out")]
    output = tmp_path_factory.mktemp("runs")
    options = (*SMALL, *sources, "train.train_iters=1", "rollout.num_rollouts=16")
    run_tool("train_zppo", *EXAMPLE, f"output_dir={output}", "name=example", *options)
    return output / "example"


def rewards_of(rollouts: list[dict[str, Any]], box: list[int]) -> list[tuple[float, Any]]:
    """Grade responses in this process by the example's own function."""
    function = load_function(str(CLONE / FUNCTION))
    return [
        read_reward(
            function(question=None, response=each["text"], parsed=each["parsed"], metadata=box)
        )
        for each in rollouts
    ]


def test_every_rollout_has_the_reward_of_the_function(boxes: Path, trained: Path) -> None:
    known = {line["id"]: line["metadata"] for line in lines(boxes / "train.jsonl")}
    groups = transcript(trained, 1)
    for group in groups:
        expected = rewards_of(group["rollouts"], known[group["question_id"]])
        assert [(each["reward"], each["parts"]) for each in group["rollouts"]] == expected
        right = [parts["accuracy"] for _, parts in expected]
        assert group["accuracy"] == sum(right) / len(right)
    ious = [each["reward"] for group in groups for each in group["rollouts"]]
    assert any(0 < iou < 0.5 for iou in ious)
    (row,) = lines(trained / "metrics.jsonl")
    assert row["reward/mean"] == row["reward/part/iou"] == pytest.approx(sum(ious) / len(ious))
    assert row["reward/part/accuracy"] == row["accuracy/plain"]
    assert row["rollout/ungraded"] == row["reward/function_errors"] == row["reward/timeouts"] == 0


def test_the_checkpoint_says_which_function_graded(trained: Path) -> None:
    (path,) = trained.glob("checkpoints/*/state.json")
    digest = source_digest(str(CLONE / FUNCTION))
    assert digest
    assert json.loads(path.read_text())["reward_functions"] == {"box": digest}


def test_partial_credit_gives_advantages(trained: Path) -> None:
    partial = [
        group
        for group in transcript(trained, 1)
        if len({each["reward"] for each in group["rollouts"]}) > 1
    ]
    assert partial
    for group in partial:
        ranked = sorted((each["reward"], each["advantage"]) for each in group["rollouts"])
        assert [advantage for _, advantage in ranked] == sorted(each for _, each in ranked)
        assert ranked[0][1] < ranked[-1][1]


def test_an_evaluation_grades_alike(boxes: Path, trained: Path, tmp_path: Path) -> None:
    run_tool("evaluate", str(trained), "--output", str(tmp_path), "--num-rollouts", "16",
             "--sampling", "paper", "rollout.max_response_tokens=48")  # fmt: skip
    known = {line["id"]: line["metadata"] for line in lines(boxes / "held_out.jsonl")}
    answers = lines(tmp_path / "answers.jsonl")
    assert len(answers) == len(known)
    graded = [
        (expected, (each["reward"], each["parts"]))
        for answered in answers
        for expected, each in zip(
            rewards_of(answered["responses"], known[answered["id"]]),
            answered["responses"],
            strict=True,
        )
    ]
    assert all(expected == found for expected, found in graded)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    overall, count = found["overall"], len(graded)
    assert overall["parts"]["iou"] == pytest.approx(sum(each[0][0] for each in graded) / count)
    right = sum(parts["accuracy"] for (_, parts), _ in graded)
    assert overall["pass_at"]["1"]["value"] == pytest.approx(right / count)
    (name, digest) = found["settings"]["reward_functions"]["box"]
    assert name == FUNCTION
    assert len(digest) == 16

"""Open questions from the shards to the update: judged by a served model, and left out when it is
gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.shard_writer import write_shards
from data.toy.digits_shards import digit_samples
from tests.support.fault_proxy import PASS, stand_between
from tests.support.loopback_server import LoopbackServer, TinyModel, serve
from tests.support.raw_server import Say, completion, http, say, serve_raw
from tests.support.running import RUN_TIMEOUT_SECONDS, judged_step, lines, run, start, transcript
from zppo_mm.bundled import TEACHER_DIR

NUM_NEW, NUM_ROLLOUTS = 8, 4


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackServer]:
    with serve(TinyModel(TEACHER_DIR)) as made:
        yield made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums and the like; every second question is open."""
    folder = tmp_path_factory.mktemp("shards")
    samples = list(digit_samples("text", "train", 40, 0))
    kinds = {True: {"answer_type": "open", "choices": []}, False: {}}
    write_shards(
        folder,
        [
            replace(sample, question={**sample.question, **kinds[i % 2 == 0]})
            for i, sample in enumerate(samples)
        ],
    )
    return folder


def options(url: str, shards: Path, **changes: Any) -> list[str]:
    given = {
        "method": "grpo",
        "data.train": f"[{{path: {shards}}}]",
        "data.held_out": f"[{{path: {shards}}}]",
        "teacher.endpoints": f"[{url}]",
        "teacher.model": "tiny",
        "teacher.num_retries": 0,
        "evaluation.judge": "open",
        "reward.judge_max_tokens": 4,
        "reward.max_malformed_fraction": 1,
        "parity.mode": "none",
        "observability.report": "false",
        "train.train_iters": 1,
        **changes,
    }
    return [f"{name}={value}" for name, value in given.items()]


def test_open_questions_are_judged(server: LoopbackServer, shards: Path, tmp_path: Path) -> None:
    folder = run(tmp_path, "run", *options(server.url, shards))
    row = judged_step(folder)
    assert "teacher/answer_seconds" not in row  # the method has no teacher
    groups = transcript(folder, 1)
    assert len(groups) == NUM_NEW
    judged = [
        request
        for request in server.requests
        if request["temperature"] == 0.0 and "Correct answer" in str(request["messages"])
    ]
    assert len(judged) >= row["reward/judged"] / NUM_ROLLOUTS
    assert {request["max_tokens"] for request in judged} == {4}


def test_a_judge_without_verdicts_ends_the_run_before_the_update(
    shards: Path, tmp_path: Path
) -> None:
    def replying(text: str) -> Say:
        return say(http(completion(text)))

    with serve_raw(lambda number: replying("I agree.")) as server:
        given = options(server.url, shards, **{"reward.max_malformed_fraction": 0.25})
        # Two replicas judge half of the responses each, and end together.
        process = start(tmp_path, "run", *given, processes=2)
        output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert f"reward.judge: the judge at {server.url} does not give verdicts" in output
    assert "such as 'I agree.'" in output
    folder = tmp_path / "run"
    assert not (folder / "metrics.jsonl").exists()
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_000000"]
    with serve_raw(lambda number: replying('```json\n{"verdict": "correct"}\n```')) as server:
        run(tmp_path, "run", *options(server.url, shards))
    (row,) = lines(folder / "metrics.jsonl")
    assert (row["reward/judge_malformed"], row["reward/judge_failures"]) == (0, 0)
    open_ids = {
        sample.question["id"]
        for index, sample in enumerate(digit_samples("text", "train", 40, 0))
        if index % 2 == 0
    }
    rewards = [
        rollout["reward"]
        for group in transcript(folder, 1)
        for rollout in group["rollouts"]
        if group["question_id"] in open_ids
    ]
    assert rewards == [1.0] * len(rewards) != []


@pytest.mark.parametrize("openness", ["half", "all"])
def test_a_judge_that_is_gone_takes_no_reward(
    server: LoopbackServer, shards: Path, tmp_path: Path, openness: str
) -> None:
    if openness == "all":
        samples = digit_samples("text", "train", 40, 0)
        shards = tmp_path / "open"
        write_shards(
            shards,
            [
                replace(sample, question={**sample.question, "answer_type": "open", "choices": []})
                for sample in samples
            ],
        )
    with stand_between(server.url, lambda number: PASS if number == 0 else "500") as proxy:
        folder = run(tmp_path, "run", *options(proxy.url, shards))
    (row,) = lines(folder / "metrics.jsonl")
    groups = transcript(folder, 1)
    assert row["reward/judge_failures"] > 0
    assert row["rollout/failed_groups"] == NUM_NEW - len(groups)
    left = [rollout for group in groups for rollout in group["rollouts"]]
    assert row["rollout/ungraded"] == sum(rollout["reward"] is None for rollout in left)
    assert all(
        rollout["reward"] is not None or (rollout["advantage"], rollout["minibatch"]) == (None, -1)
        for rollout in left
    )
    for group in groups:
        rewards = [
            rollout["reward"] for rollout in group["rollouts"] if rollout["reward"] is not None
        ]
        assert group["accuracy"] == pytest.approx(sum(rewards) / len(rewards))
    num_tokens = sum(rollout["num_tokens"] for rollout in left if rollout["reward"] is not None)
    assert row["batch/loss_tokens"] == num_tokens
    if openness == "all":
        assert all(rollout["parsed"] is None for rollout in left if rollout["reward"] is not None)

"""Runs with the bundled teacher behind a server: answers, faults, a server that dies, and a key
that must be seen nowhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import PASS, stand_between
from tests.support.loopback_server import LoopbackServer
from tests.support.running import (
    RUN_TIMEOUT_SECONDS,
    lines,
    run,
    start,
    stopped_by_the_teacher,
    transcript,
)

KEY = "sk-4f9a0c77d1e2b3a4"


def options(url: str, **changes: Any) -> list[str]:
    given = {
        "teacher.endpoints": f"[{url}]",
        "teacher.model": "tiny",
        "teacher.max_response_tokens": 64,
        "teacher.backoff_seconds": 0.1,
        "parity.mode": "none",
        "observability.report": "false",
        "evaluation.num_questions": 2,
        **changes,
    }
    return [f"{name}={value}" for name, value in given.items()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "metrics.jsonl")


def hard_questions(groups: list[dict[str, Any]]) -> set[str]:
    return {
        group["question_id"]
        for group in groups
        if group["kind"] in ("new", "replayed") and group["accuracy"] < 0.5
    }


def test_two_ranks_ask_and_agree_and_the_key_is_nowhere(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    server.api_key = KEY
    # Every fifth request fails in one of four ways; one of them repeats the key to the client.
    faults = ("500", "429", "half_body", "reset")
    with stand_between(
        server.url, lambda number: PASS if number % 5 != 3 else faults[number // 5 % len(faults)]
    ) as proxy:
        given = options(
            proxy.url,
            **{
                "teacher.api_key_env": "TEACHER_KEY",
                "train.train_iters": 2,
                "modality": "mixed",
                "teacher.video": "frames",
            },
        )
        process = start(tmp_path, "run", *given, processes=2)
        output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
        assert process.returncode == 0, output[-6000:]
    folder = tmp_path / "run"
    asked = 0
    for step, row in enumerate(metrics(folder), start=1):
        groups = transcript(folder, step)
        hard = hard_questions(groups)
        rewards = {
            group["question_id"]: group["teacher_rewards"]
            for group in groups
            if "teacher_rewards" in group
        }
        assert set(rewards) == hard  # only hard questions reach the teacher
        assert all(len(each) == 2 for each in rewards.values())
        assert row["teacher/lost_rollouts"] == row["teacher/failed_questions"] == 0
        assert row["teacher/completion_tokens"] > 0
        assert row["teacher/answer_seconds"] > 0
        asked += len(hard)
    texts = [str(request["messages"]) for request in server.requests]
    assert any("data:image/png;base64," in text for text in texts)
    assert any("A video as " in text for text in texts)
    # Every request that was not spoilt before the model saw it: one per hard question, the
    # probe, and answers that were cut off.
    assert asked + 1 <= len(server.requests) <= asked + 1 + proxy.injected["half_body"]
    assert len(proxy.delivered) == asked + 1
    assert (
        sum(
            row.get(f"teacher/faults/{name}", 0)
            for row in metrics(folder)
            for name in ("http_500", "http_429", "cut_off")
        )
        > 0
    )
    leaks = [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    assert leaks == []
    assert KEY not in output


def test_without_answers_the_run_goes_on_with_ncq(server: LoopbackServer, tmp_path: Path) -> None:
    with stand_between(server.url, lambda number: PASS if number == 0 else "500") as proxy:
        given = options(
            proxy.url,
            **{
                "teacher.on_failure": "ncq_only",
                "teacher.num_retries": 1,
                "train.train_iters": 2,
                "modality": "text",
            },
        )
        folder = run(tmp_path, "run", *given)
    for step, row in enumerate(metrics(folder), start=1):
        groups = transcript(folder, step)
        hard = hard_questions(groups)
        assert row["teacher/failed_questions"] == len(hard) > 0
        assert row["teacher/lost_rollouts"] == 2 * len(hard)
        assert {group["kind"] for group in groups} <= {"new", "replayed", "ncq"}
        assert sum(group["kind"] == "ncq" for group in groups) == min(len(hard), 4)  # the whole cap


@pytest.mark.timeout(900)  # three runs one after another
def test_a_dead_teacher_stops_the_run_with_a_checkpoint_and_it_resumes(
    server: LoopbackServer, tmp_path: Path
) -> None:
    alive = {"until": 10**9}
    common = {"train.train_iters": 3, "modality": "text", "checkpoint.interval": 10}
    whole = run(tmp_path, "whole", *options(server.url, **common))
    num_first = 1 + int(metrics(whole)[0]["teacher/requests"])
    alive["until"] = num_first  # the probe and the first step
    with stand_between(
        server.url, lambda number: PASS if number < alive["until"] else "503"
    ) as proxy:
        given = options(
            proxy.url, **common, **{"teacher.on_failure": "stop", "teacher.num_retries": 1}
        )
        output = stopped_by_the_teacher(tmp_path, "cut", *given)
        assert "of step 2, got 'http_503" in output
        assert "Traceback" not in output
        assert os.listdir(tmp_path / "cut" / "checkpoints") == ["step_000001"]
        alive["until"] = 10**9
        resumed = run(tmp_path, "cut", *given)
    assert [row["step"] for row in metrics(resumed)] == [1, 2, 3]
    for step in (1, 2, 3):
        assert [group["uid"] for group in transcript(resumed, step)] == [
            group["uid"] for group in transcript(whole, step)
        ]
    assert metrics(resumed)[2]["policy/loss"] == pytest.approx(
        metrics(whole)[2]["policy/loss"], rel=1e-6
    )


def test_dead_from_the_first_step_it_stops_before_any_update(
    server: LoopbackServer, tmp_path: Path
) -> None:
    with stand_between(server.url, lambda number: "500") as proxy:
        given = options(
            proxy.url,
            **{
                "teacher.on_failure": "wait",
                "teacher.max_wait_seconds": 2.0,
                "train.train_iters": 1,
                "modality": "text",
            },
        )
        process = start(tmp_path, "cut", *given)
        output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
        assert process.returncode == 1, output[-3000:]
        assert "not answered within 2 s" in output
    assert os.listdir(tmp_path / "cut" / "checkpoints") == ["step_000000"]
    folder = run(
        tmp_path, "cut", *options(server.url, **{"train.train_iters": 1, "modality": "text"})
    )
    assert [row["step"] for row in metrics(folder)] == [1]
    assert [row["step"] for row in lines(folder / "evaluation.jsonl")] == [0, 1]


def test_answers_that_no_prompt_waits_for_may_be_lost_without_losing_the_step(
    server: LoopbackServer, tmp_path: Path
) -> None:
    # No room for a reformulated prompt: the answers are for the records alone.
    common = {
        "train.train_iters": 2,
        "modality": "text",
        "zone.rho_aug": 0.0,
        "evaluation.interval": 1,
    }
    with stand_between(server.url, lambda number: PASS if number == 0 else "500") as proxy:
        given = options(
            proxy.url, **common, **{"teacher.on_failure": "stop", "teacher.num_retries": 0}
        )
        stopped_by_the_teacher(tmp_path, "cut", *given)
    (row,) = metrics(tmp_path / "cut")
    assert row["policy/updates"] > 0
    assert "step_000001" in os.listdir(tmp_path / "cut" / "checkpoints")
    groups = transcript(tmp_path / "cut", 1)
    assert {group["kind"] for group in groups} == {"new"}
    assert (
        row["teacher/failed_questions"]
        == sum(group.get("teacher_rewards") == [] for group in groups)
        > 0
    )
    # The judge may be lost with the teacher: what was due is evaluated when the run goes on.
    assert [each["step"] for each in lines(tmp_path / "cut" / "evaluation.jsonl")] == [0]
    run(tmp_path, "cut", *options(server.url, **common))
    assert [each["step"] for each in lines(tmp_path / "cut" / "evaluation.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("method", ["zppo", "prefix"])
def test_when_the_teacher_is_asked_changes_nothing_but_the_time(
    server: LoopbackServer, tmp_path: Path, method: str
) -> None:
    server.latency_seconds = 0.2
    records = {}
    for name, batch in (("waves", 8), ("whole", 128)):
        before = len(server.requests)
        given = {
            "method": method,
            "train.train_iters": 2,
            "modality": "text",
            "rollout.max_batch_size": batch,
        }
        given["teacher.compressor"] = (
            "teacher"  # what is rewritten together depends on the time, what comes of it does not
        )
        folder = run(tmp_path, name, *options(server.url, **given))
        records[name] = (
            [transcript(folder, step) for step in (1, 2)],
            len(server.requests) - before,
        )
    assert records["waves"] == records["whole"]
    assert records["waves"][1] > 2  # besides the first probe, questions of both steps were asked
    for groups in records["waves"][0]:
        asked = [group for group in groups if "teacher_rewards" in group]
        # With prefixes no more than the pre-cap keeps: rho_aug is 0.5 of 8 new questions.
        assert method != "prefix" or len(asked) <= 4

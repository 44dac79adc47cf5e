"""Runs that distil: from a teacher in this process on the student's text, and from the log-probs of
a served one on its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.loopback_server import TinyModel, serve
from tests.support.running import lines, run, transcript
from zppo_mm.bundled import TEACHER_DIR

COMMON = (
    "train.train_iters=2",
    "parity.mode=none",
    "observability.report=false",
    "evaluation.num_questions=2",
    "teacher.max_response_tokens=64",
    "modality=text",
)


def test_on_the_students_text_over_two_tensor_ranks(tmp_path: Path) -> None:
    given = (
        *COMMON,
        "method=on_distill",
        "modality=mixed",
        "parallel.tensor_model_parallel_size=2",
    )
    folder = run(tmp_path, "run", *given, processes=2)
    rows = lines(folder / "metrics.jsonl")
    for step, row in enumerate(rows, start=1):
        assert row["policy/updates"] == 2
        assert row["policy/loss"] > 0
        assert 0 < row["distill/agreement"] < 1
        # Every token of every rollout counts, whatever its reward was.
        sampled = sum(
            len(group["rollouts"]) * (group["kind"] == "new") for group in transcript(folder, step)
        )
        assert sampled == 8 * 4
        assert row["batch/loss_tokens"] == pytest.approx(row["response/tokens"] * sampled)
        assert "policy/clip_low" not in row
        assert "distill/left_out" not in row


def test_on_the_text_of_a_served_teacher(tmp_path: Path) -> None:
    with serve(TinyModel(TEACHER_DIR)) as server:
        endpoint = (f"teacher.endpoints=[{server.url}]", "teacher.model=tiny", "distill.top_k=8")
        folder = run(
            tmp_path,
            "run",
            *COMMON,
            *endpoint,
            "method=off_distill_replay",
            "train.updates_per_step=1",
            processes=2,
        )
        assert {request.get("top_logprobs") for request in server.requests[1:]} == {8}
    for row in lines(folder / "metrics.jsonl"):
        assert row["policy/updates"] == 1
        assert row["policy/loss"] > 0
        assert row["distill/agreement"] > 0.5
        assert row["distill/left_out"] == 0
        assert row["batch/loss_tokens"] > 0

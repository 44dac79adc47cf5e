"""Runs with the teacher on the last rank of the job: the same run as without, and a judge."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.shard_writer import write_shards
from data.toy.digits_shards import digit_samples
from tests.support.running import RUN_TIMEOUT_SECONDS, judged_step, lines, run, start, transcript
from zppo_mm.bundled import TEACHER_DIR

pytestmark = pytest.mark.timeout(900)  # two or three runs one after another
COMMON = {
    "modality": "text",
    "teacher.max_response_tokens": 64,
    "parity.mode": "none",
    "observability.report": "false",
    "evaluation.num_questions": 2,
    "train.train_iters": 2,
}


def options(**changes: Any) -> list[str]:
    return [f"{name}={value}" for name, value in {**COMMON, **changes}.items()]


def test_the_run_is_the_same_as_with_the_teacher_inside(tmp_path: Path) -> None:
    inside = run(tmp_path, "inside", *options(), processes=2)
    # Small parts, so that the teacher is asked early in the plain phase and there is something left
    # to sample while it answers.
    apart = run(
        tmp_path,
        "apart",
        *options(**{"teacher.num_ranks": 1, "rollout.max_batch_size": 4}),
        processes=3,
    )
    for step in (1, 2):
        assert transcript(apart, step) == transcript(inside, step)
    for row in lines(apart / "metrics.jsonl"):
        assert row["teacher/answer_seconds"] > 0
        assert row["teacher/failed_questions"] == row["teacher/lost_rollouts"] == 0
    log = (apart / "run.log").read_text()
    assert "trained model in" in log
    # Resumed without ranks for the teacher, the run goes on.
    resumed = run(
        tmp_path,
        "apart",
        *options(**{"rollout.max_batch_size": 4, "train.train_iters": 3}),
        processes=1,
    )
    assert [row["step"] for row in lines(resumed / "metrics.jsonl")] == [1, 2, 3]


def test_open_questions_are_judged_by_the_teacher(tmp_path: Path) -> None:
    samples = digit_samples("text", "train", 40, 0)
    write_shards(
        tmp_path / "open",
        [
            replace(each, question={**each.question, "answer_type": "open", "choices": []})
            for each in samples
        ],
    )
    given = options(
        **{
            "method": "bcq",
            "data.train": f"[{{path: {tmp_path / 'open'}}}]",
            "teacher.num_ranks": 1,
            "reward.judge_max_tokens": 4,
            "reward.max_malformed_fraction": 1,
            "train.train_iters": 1,
        }
    )
    folder = run(tmp_path, "run", *given, processes=3)
    judged_step(folder)
    rewards = [
        reward for group in transcript(folder, 1) for reward in group.get("teacher_rewards", [])
    ]
    assert rewards == [0.0] * len(rewards) != []


def test_a_teacher_that_cannot_be_loaded_ends_the_job_with_its_error(tmp_path: Path) -> None:
    # Complete by its names, so that only the teacher's rank finds out.
    folder = shutil.copytree(TEACHER_DIR, tmp_path / "teacher")
    (folder / "tokenizer.json").write_text("no tokenizer", encoding="utf-8")
    process = start(
        tmp_path, "run", *options(**{"teacher.num_ranks": 1, "teacher.model": folder}), processes=3
    )
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 1, output[-3000:]
    # Logged by the student, not only in the traceback of the teacher's rank.
    assert re.search(
        r"E teacher: its ranks have ended, got .rank 2: ConfigError: \S+: the tokenizer cannot be "
        r"loaded",
        output,
    ), output[-3000:]
    assert "zppo_mm/run/teacher_job.py" not in output  # no traceback
    assert not (tmp_path / "run").exists()

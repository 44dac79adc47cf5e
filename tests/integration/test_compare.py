"""The comparison from its command line: two methods, real runs, none of them twice, and a killed
one goes on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.running import CLONE, SMALL, lines, run_python

METHODS = ("grpo_replay", "zppo")
STEPS = 2


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool on a comparison of two methods with one seed."""
    path = folder / "compare.yaml"
    options = {
        "modality": "text",
        "train.train_iters": STEPS,
        "checkpoint.interval": 1,
        "observability.report": False,
    }
    content = {
        "options": options,
        "methods": list(METHODS),
        "seeds": [0],
        "parallel_runs": 2,
        "output_dir": str(folder / "out"),
    }
    path.write_text(json.dumps(content))
    return run_python(str(CLONE / "tools" / "compare.py"), str(path), *SMALL, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    done = compare(folder)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "| zppo | 1 of 1 |" in done.stdout
    return folder


def test_every_method_answers_the_same_held_out_questions(folder: Path) -> None:
    answers = [
        {
            step: lines(
                folder / "out" / f"{method}-seed0" / "evaluations" / f"step_{step:06d}.jsonl"
            )
            for step in (0, STEPS)
        }
        for method in METHODS
    ]
    assert answers[0][0] == answers[1][0]
    for of_method, method in zip(answers, METHODS, strict=True):
        recorded = {
            row["step"]: row["accuracy"]
            for row in lines(folder / "out" / f"{method}-seed0" / "evaluation.jsonl")
        }
        for step, questions in of_method.items():
            assert [question["question_id"] for question in questions] == [
                question["question_id"] for question in answers[0][0]
            ]
            rewards = [
                rollout["reward"] for question in questions for rollout in question["rollouts"]
            ]
            assert recorded[step] == pytest.approx(sum(rewards) / len(rewards))
            assert {question["modality"] for question in questions} == {"text"}


def test_a_finished_comparison_starts_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*-seed0/*")}
    again = compare(folder)
    assert again.returncode == 0, again.stderr[-6000:]
    assert "2 runs, of them 2 finished or refused before" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*-seed0/*")} == before


def test_a_killed_run_goes_on_and_the_end_is_the_same(folder: Path) -> None:
    run = folder / "out" / "zppo-seed0"
    whole = (run / "evaluations" / f"step_{STEPS:06d}.jsonl").read_text()
    # As a kill after the first step leaves it: the checkpoint of step 1, no export, and records of
    # a step that was not saved.
    shutil.rmtree(run / "hf")
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:06d}")
    done = compare(folder)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "1 finished or refused before" in done.stderr
    assert f"resumed {run} after step 1" in (run / "run.log").read_text()
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2]
    assert (run / "evaluations" / f"step_{STEPS:06d}.jsonl").read_text() == whole


def test_a_run_that_cannot_start_is_named_and_the_other_is_in_the_report(folder: Path) -> None:
    done = compare(
        folder, "data.train=[{path: nowhere}]", f"output_dir={folder / 'broken'}", "methods=[grpo]"
    )
    assert done.returncode == 1
    assert "compare: grpo-seed0 failed: exit status" in done.stderr
    assert "nowhere" in done.stderr
    assert "| grpo | not started |" in (folder / "broken" / "comparison.md").read_text()


def test_the_audit_reads_the_runs(folder: Path) -> None:
    tool, run = str(CLONE / "tools" / "audit.py"), str(folder / "out" / "zppo-seed0")
    done = run_python(tool, run, "--json", "--steps", f"1-{STEPS}")
    assert done.returncode == 0, done.stderr
    (audit,) = json.loads(done.stdout).values()
    assert audit["num_steps"] == STEPS
    assert audit["ncq_listed"]["total"] > 0

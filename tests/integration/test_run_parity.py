"""A run with the gate is the run without it, and a run whose media are lost ends before its first
step.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.running import RUN_TIMEOUT_SECONDS, lines, run, start, transcript
from zppo_mm.bundled import STUDENT_DIR

OPTIONS = ("method=grpo", "train.train_iters=2", "evaluation.num_questions=1")
METRICS = (
    "policy/loss",
    "policy/grad_norm",
    "policy/entropy",
    "accuracy/plain",
    "data/samples",
    "reward/timeouts",
)


def test_the_gate_changes_nothing_but_its_own_file(tmp_path: Path) -> None:
    gated, plain = (
        run(tmp_path, "gated", *OPTIONS, "parity.interval=1"),
        run(tmp_path, "plain", *OPTIONS, "parity.mode=none"),
    )
    for step in (1, 2):
        assert transcript(gated, step) == transcript(plain, step)
    measured = [lines(path / "metrics.jsonl") for path in (gated, plain)]
    left, right = ([[row[name] for name in METRICS] for row in rows] for rows in measured)
    assert left == right
    report, later = lines(gated / "parity.jsonl")
    for row, step, why_not in ((report, 0, ""), (later, 1, "the weights have been trained")):
        assert [each["modality"] for each in row["modalities"]] == ["text", "image", "video"]
        assert (row["step"], row["findings"]) == (step, [])
        assert row["not_compared"].startswith(why_not)
    assert report["not_compared"] == ""
    assert "parity at step 0, float32" in (gated / "run.log").read_text()
    assert not (plain / "parity.jsonl").exists()
    # Going on from the checkpoint compares again, without the source.
    run(tmp_path, "gated", *OPTIONS, "train.train_iters=3")
    *before, last = lines(gated / "parity.jsonl")
    assert before == [report, later]
    assert last["step"] == 2
    assert last["not_compared"].startswith("the weights have been trained")


def test_lost_media_end_the_run(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(STUDENT_DIR, student)
    template = student / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|image_pad|>", ""))
    process = start(tmp_path, "blind", *OPTIONS, f"model.student={student}")
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "parity: image: the media of a question do not reach its prompt" in output
    assert "Traceback" not in output
    assert not (tmp_path / "blind" / "metrics.jsonl").exists()

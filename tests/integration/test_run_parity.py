"""A run with the gate is the run without it, and a run whose media are lost ends before its first
step.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.running import RUN_TIMEOUT_SECONDS, lines, run, start, transcript
from zppo_mm.bundled import STUDENT_DIR

OPTIONS = ("method=grpo", "train.train_iters=1", "evaluation.num_questions=1")
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
        run(tmp_path, "gated", *OPTIONS),
        run(tmp_path, "plain", *OPTIONS, "parity.mode=none"),
    )
    assert transcript(gated, 1) == transcript(plain, 1)
    [left], [right] = lines(gated / "metrics.jsonl"), lines(plain / "metrics.jsonl")
    assert [left[name] for name in METRICS] == [right[name] for name in METRICS]
    [report] = lines(gated / "parity.jsonl")
    assert [row["modality"] for row in report["modalities"]] == ["text", "image", "video"]
    assert (report["step"], report["findings"], report["not_compared"]) == (0, [], "")
    assert "parity at step 0, float32" in (gated / "run.log").read_text()
    assert not (plain / "parity.jsonl").exists()
    # Going on from the checkpoint compares again, without the source.
    run(tmp_path, "gated", *OPTIONS, "train.train_iters=2")
    first, second = lines(gated / "parity.jsonl")
    assert first == report
    assert second["step"] == 1
    assert second["not_compared"].startswith("the run goes on from a checkpoint")


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

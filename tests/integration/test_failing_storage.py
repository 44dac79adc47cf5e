"""Storage that answers with errors for some steps: the run goes on, and nothing is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.running import CLONE, RUN_TIMEOUT_SECONDS, SMALL, environment, lines, transcript

STEPS = 6
OPTIONS = (
    "modality=text",
    "method=grpo",
    "parity.mode=none",
    "checkpoint.interval=1",
    "observability.report=false",
    "train.num_new_questions=4",
    "evaluation.num_questions=2",
)
REFUSED_PER_STEP = 4
"""Transcript, buffer and metrics of a step, and the save that asks for them."""


def run_on(output_dir: Path, failures: list[str], *options: str) -> tuple[int, str]:
    """Run where storage fails; returns exit code and output."""
    script = CLONE / "tests" / "support" / "failing_storage.py"
    tool = CLONE / "tools" / "train_zppo.py"
    words = [sys.executable, script, *failures, "--", tool, f"output_dir={output_dir}", "name=run"]
    done = subprocess.run(
        [*map(str, words), *SMALL, *OPTIONS, *options],
        cwd=CLONE,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_TIMEOUT_SECONDS,
    )
    return done.returncode, done.stdout


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


@pytest.mark.timeout(900)
def test_a_run_outlives_storage_that_refuses_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    everything = f"/transcripts/.step_000003,{folder},{2 * REFUSED_PER_STEP}"
    checkpoint_of = "/.step_{:06d}.partial,/checkpoints/.step_,{}"
    # All that steps 3 and 4 write, then the tensors of the last checkpoint, twice.
    failures = [everything, checkpoint_of.format(STEPS, 2)]
    code, output = run_on(tmp_path, failures, f"train.train_iters={STEPS}")
    assert code == 0, output[-3000:]
    assert "step 3 is not saved (1 of at most 3 failures in a row)" in output
    assert "3 records of steps wait for storage, got [Errno 5]" in output
    assert "step 4 is not saved (2 of at most 3 failures in a row)" in output
    assert "records: storage has taken what waited for it" in output
    assert f"step {STEPS} is not saved (2 of at most 3 failures in a row)" in output
    steps = lines(folder / "metrics.jsonl")
    assert [each["step"] for each in steps] == list(range(1, STEPS + 1))
    assert [each["records/failed_writes"] for each in steps[2:]] == [0, 4, 4, 0]
    assert [each["records/waiting_bytes"] > 0 for each in steps[2:]] == [False, True, True, False]
    assert [each["checkpoint/failed"] for each in steps[2:]] == [0, 1, 1, 0]
    assert all(transcript(folder, step) for step in range(1, STEPS + 1))
    assert checkpoints(folder) == {f"step_{step:06d}" for step in (STEPS - 1, STEPS)}

    # A run that may not fail once.
    code, output = run_on(
        tmp_path,
        [checkpoint_of.format(STEPS + 1, 1)],
        f"train.train_iters={STEPS + 1}",
        "checkpoint.max_failed_saves=1",
    )
    assert code == 1, output[-3000:]
    assert "Traceback" not in output
    assert "checkpoint.max_failed_saves: 1 saves in a row have failed, the last with: " in output
    assert f"The run would continue after step {STEPS}" in output
    assert checkpoints(folder) == {f"step_{step:06d}" for step in (STEPS - 1, STEPS)}

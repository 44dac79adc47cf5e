"""A network that computes NaN ends a real run by name, on one process and on two, without a
traceback.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.running import RUN_TIMEOUT_SECONDS, lines, start
from zppo_mm.bundled import STUDENT_DIR

OPTIONS = ("method=grpo", "train.train_iters=2")
LAST_NORM = "model.language_model.norm.weight"
TOWER = "model.visual.merger.linear_fc2.weight"


def student(tmp_path: Path, broken: str) -> Path:
    """Copy the bundled student with one weight that is NaN."""
    folder = tmp_path / "student"
    shutil.copytree(STUDENT_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    weights[broken].view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def output_of(tmp_path: Path, *options: str, processes: int = 1) -> str:
    process = start(tmp_path, "run", *OPTIONS, *options, processes=processes)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 1
    # torchrun has a traceback of its own for a process that failed, after all that the processes
    # say.
    assert (
        "Traceback"
        not in output.partition("torch/distributed/run.py")[0].rpartition("Traceback")[0]
    )
    assert processes > 1 or "Traceback" not in output
    return output


@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_network_ends_the_run_at_the_first_questions(
    tmp_path: Path, processes: int
) -> None:
    options = ("modality=text", "parity.mode=none", f"model.student={student(tmp_path, LAST_NORM)}")
    output = output_of(tmp_path, *options, processes=processes)
    assert (
        "sampling: the network is broken, got logits that are not finite for 6 of the last 6 "
        "prompts (question 'digits-" in output
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_gate_names_the_modality_that_is_broken(tmp_path: Path) -> None:
    output = output_of(tmp_path, f"model.student={student(tmp_path, TOWER)}")
    assert (
        "parity: image: the network is broken, got logits that are not finite for question "
        "'digits-image-" in output
    )
    (report,) = lines(tmp_path / "run" / "parity.jsonl")
    assert [row["modality"] for row in report["modalities"] if row["rollout"] is not None] == [
        "text"
    ]
    assert len(report["findings"]) == 2

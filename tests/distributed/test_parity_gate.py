"""The gate on two ranks of every kind: green on a sound run, and the same verdict on every rank of
an unsound one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import run_ranks
from zppo_mm.config.load import load_config
from zppo_mm.parallel import groups as parallel
from zppo_mm.parity.compare import ParityError
from zppo_mm.parity.gate import check_parity
from zppo_mm.run.build import build_run
from zppo_mm.run.parts import Run
from zppo_mm.run_folder import RunFolder

pytestmark = pytest.mark.timeout(700)  # a start of two ranks takes a minute on a busy machine
# Float32 sums in another order and over two ranks; the largest seen is 5e-6.
LARGEST_GAP = 1e-4
LAYOUTS = {
    "tensor": ("parallel.tensor_model_parallel_size=2",),
    "tensor, sequence": (
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
    ),
    "pipeline": ("parallel.pipeline_model_parallel_size=2",),
    "data": (),
}


def verdict(run: Run, folder: Path) -> str:
    try:
        check_parity(run, RunFolder(folder), 0)
    except ParityError as error:
        return str(error)
    return ""


def check_layouts(output_dir: Path) -> dict[str, Any]:
    """Run the gate on every layout, sound and with one wrong weight on the last rank alone."""
    results: dict[str, Any] = {}
    for name, options in LAYOUTS.items():
        # A small micro-batch cuts the responses into several packs.
        config = load_config(
            None,
            [f"output_dir={output_dir}", "method=grpo", "train.micro_batch_tokens=300", *options],
        )
        parallel.initialize(config.parallel, config.seed)
        run = build_run(config)
        stream = run.stream.state_dict()
        sound = verdict(run, output_dir / name)
        assert run.stream.state_dict() == stream
        layers = run.policy.model.language_model.decoder.layers
        if parallel.rank() == 1:
            with torch.no_grad():
                layers[-1].mlp.linear_fc2.weight[5, 7] += 3.0
        results[name] = (sound, verdict(run, output_dir / f"{name} wrong"))
        run.close()
    parallel.shutdown()
    return results


def test_every_layout_passes_and_sees_a_wrong_weight(tmp_path: Path) -> None:
    first, second = run_ranks(check_layouts, 2, tmp_path, timeout_seconds=600)
    reports = {name: json.loads((tmp_path / name / "parity.jsonl").read_text()) for name in LAYOUTS}
    for name, report in reports.items():
        assert first[name][0] == second[name][0] == "", name
        assert report["not_compared"] == ""
        assert [row["modality"] for row in report["modalities"]] == ["text", "image", "video"]
        for row, other in zip(report["modalities"], reports["data"]["modalities"], strict=True):
            assert max(row["rollout"]["max"], row["source"]["max"]) <= LARGEST_GAP, name
            counts = ("num_questions", "media", "media_in_prompt", "placeholders", "features")
            assert [row[count] for count in counts] == [other[count] for count in counts], name
            assert row["rollout"]["num_tokens"] == other["rollout"]["num_tokens"], name
    for name in ("tensor", "tensor, sequence", "pipeline"):
        assert (
            "the source checkpoint in transformers and the training forward pass disagree"
            in first[name][1]
        ), name
        assert first[name][1] == second[name][1], name
    # With two replicas of which one is wrong, its part of the responses is: what it sampled
    # itself, what the other one did too.
    assert first["data"][1] == second["data"][1] != ""

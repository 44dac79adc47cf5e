"""An engine that goes on sampling with the weights of the start: the metrics see it, importance
sampling corrects for it, and the gate after a step ends the run with a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParityConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parity.compare import ParityError
from zppo_mm.parity.gate import is_parity_due
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.build import build_run
from zppo_mm.run.parts import Run
from zppo_mm.run.resume import resume
from zppo_mm.step import run_step
from zppo_mm.train import folder_of, train_steps

pytestmark = pytest.mark.medium
OPTIONS = (
    "name=run",
    "method=grpo",
    "train.train_iters=3",
    "train.num_new_questions=6",
    "train.lr=1e-3",
    "train.updates_per_step=1",
    "rollout.num_rollouts=4",
    "rollout.max_response_tokens=24",
    "evaluation.num_questions=1",
    "observability.report=false",
    "observability.trackers=[]",
    "checkpoint.interval=10",
    "parity.interval=1",
    "parity.num_questions=1",
    "parity.compare_source=false",
    "algorithm.importance_cap=2",
)
# Float32 sums in another order; the largest seen is 5e-6.
EQUAL = 1e-4


class StaleEngine:
    """Samples with the weights that the network had at the start."""

    def __init__(self, run: Run) -> None:
        self._model = run.policy.model
        self._engine = MegatronEngine(self._model, run.config.seed)
        self._weights = self._copy()

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self._model.named_parameters()}

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        trained = self._copy()
        self._load(self._weights)
        try:
            return self._engine.generate(requests, sampling)
        finally:
            self._load(trained)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    config = load_config(None, [f"output_dir={tmp_path}", *OPTIONS])
    parallel.initialize(config.parallel, config.seed)
    run = build_run(config)
    sampler = GroupSampler(StaleEngine(run), run.encoder, run.verifier, ParallelExchange())
    yield dataclasses.replace(run, stages=dataclasses.replace(run.stages, sampler=sampler))
    run.close()
    parallel.shutdown()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stale_sampler_ends_the_run_with_a_checkpoint(run: Run) -> None:
    folder = folder_of(run.config)
    said = "sampling and the training forward pass disagree, got a largest gap .*parity.max_gap"
    with pytest.raises(ParityError, match=said):
        train_steps(run, folder)
    first, second = lines(folder.parity)
    assert (first["step"], first["findings"]) == (0, [])
    assert second["step"] == 1
    assert len(second["findings"]) >= 1
    assert second["not_compared"].startswith("the weights have been trained")
    # On-policy so far: the whole step is recorded and saved.
    [metrics] = lines(folder.path / "metrics.jsonl")
    assert 0 < metrics["mismatch/gap"] <= metrics["mismatch/gap_max"] < EQUAL
    assert metrics["mismatch/truncated"] == 0
    assert resume(run, folder) == 1

    # The next step is sampled with weights of the one before.
    measured = run_step(run.stages, 2).metrics.values()
    assert measured["mismatch/gap_max"] > 1e-2
    assert measured["mismatch/kl"] > 1e-4
    # The ratio is against the policy itself, the weight is its distance from the sampler.
    assert measured["policy/ratio"] == pytest.approx(1.0, abs=EQUAL)
    assert abs(measured["policy/importance"] - 1) > 1e-3
    parts = {name.rsplit("/", 1)[1] for name in measured if name.startswith("mismatch/gap/")}
    assert parts
    assert parts <= {"text", "image", "video"}
    by_part = [measured[f"mismatch/gap_max/{part}"] for part in parts]
    assert max(by_part) == measured["mismatch/gap_max"]
    assert math.isfinite(measured["policy/loss"])


def test_when_it_is_due() -> None:
    every_two, never = ParityConfig(interval=2), ParityConfig()
    assert [step for step in range(1, 7) if is_parity_due(every_two, 6, step)] == [2, 4]
    assert not any(is_parity_due(never, 6, step) for step in range(1, 7))

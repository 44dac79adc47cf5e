"""Old log-probs from the training forward pass: the ratio starts at 1, weights, rejections and
differences are the formulas', on any layout.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    RandomMedia,
    build_policy,
    make_batches,
    make_groups,
    make_plan,
    reduced,
)
from tests.support.training_example import write_tiny_folder as write_folder
from zppo_mm.algorithms.importance import NO_CORRECTION, MismatchCorrection
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.experience import Batch, TrainingSample
from zppo_mm.observability.metrics import StepMetrics
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.batching import build_batches
from zppo_mm.training.old_logprobs import need_old_logprobs, response_logprobs, with_old_logprobs
from zppo_mm.training.policy import Policy

CAP = 1.2
BOUND, TOKEN_BOUND = 1.25, 4.0
STEP = 3
# Two passes over the same tokens in float32, packed differently by another layout.
TOLERANCE = 2e-5
# The largest difference of a log-prob of this network in bfloat16 is 1.6e-3.
COARSE_TOLERANCE = 5e-3
ONE_UPDATE = replace(TRAIN, updates_per_step=1)
LAYOUTS = {
    "data 2": ParallelConfig(),
    "tensor 2": ParallelConfig(tensor_model_parallel_size=2),
    "pipeline 2": ParallelConfig(pipeline_model_parallel_size=2),
    "context 2": ParallelConfig(context_parallel_size=2),
}
CORRECTIONS = {
    "unknown": NO_CORRECTION,
    "token": MismatchCorrection(cap=CAP),
    "sequence, rejection": MismatchCorrection(
        level="sequence", cap=CAP, rejection_bound=BOUND, rejection_token_bound=TOKEN_BOUND
    ),
    "geometric": MismatchCorrection(level="geometric", cap=1.01),
    "rejection alone": MismatchCorrection(rejection_bound=BOUND),
    "bfloat16": MismatchCorrection(cap=CAP),
}
# Loss, gradient norm, means of the update, and what the step measures.
Update = tuple[float, float, dict[str, float | None], dict[str, float]]


def samples_of(name: str) -> list[TrainingSample]:
    """Half of the first case's old log-probs nobody knows; every third response is stale."""
    return [
        replace(
            sample,
            old_logprobs=None if name == "unknown" and index % 2 == 0 else sample.old_logprobs,
            policy_version=STEP - (index % 3 == 0),
        )
        for index, sample in enumerate(make_groups())
    ]


def recomputed(
    policy: Policy, case: Case, correction: MismatchCorrection
) -> tuple[list[Batch], StepMetrics]:
    """Return the update with old log-probs of the policy."""
    plan, samples, metrics = make_plan(case, parallel.data_size()), case.samples(), StepMetrics()
    logprobs = response_logprobs(policy, plan, samples, make_batches(case), 1.0)
    samples = with_old_logprobs(samples, logprobs, correction, STEP, metrics)
    media = RandomMedia() if parallel.is_first_stage() else None
    replica, device = parallel.data_rank(), parallel.device()
    return build_batches(plan, samples, replica=replica, media=media, device=device), metrics


def first_updates(folder: Path, layout: ParallelConfig) -> dict[str, Update]:
    """Return one update with every correction."""
    results = {}
    for name, correction in CORRECTIONS.items():
        samples = lambda name=name: samples_of(name)  # noqa: E731
        dtype = "bfloat16" if name == "bfloat16" else "float32"
        case = Case(
            layout, train=ONE_UPDATE, samples=samples, share_prompts=True, params_dtype=dtype
        )
        policy = build_policy(folder, case)
        batches, metrics = recomputed(policy, case, correction)
        (update,) = policy.train_step(batches).updates
        results[name] = (update.loss, update.grad_norm, reduced(update), metrics.values())
    parallel.shutdown()
    return results


def trained_logprobs(folder: Path) -> list[list[float]]:
    """Return the log-probs of every sample's response, each sample in a pass of its own."""
    result = []
    for sample in make_groups():
        case = Case(train=ONE_UPDATE, samples=lambda sample=sample: [sample])
        policy = build_policy(folder, case)
        (values,) = policy.compute_logprobs(make_batches(case)[0])
        result.append(values[sample.loss_mask != 0].tolist())
    parallel.shutdown()
    return result


def naive(name: str, trained: list[list[float]]) -> tuple[float, dict[str, Any]]:
    """Return the loss and the measurements by the formulas, in plain Python."""
    correction, samples = CORRECTIONS[name], samples_of(name)
    total, gaps_of = 0.0, {part: [] for part in ("all", "text", "image", "stale")}
    truncated, rejected = [], []
    for sample, logprobs in zip(samples, trained, strict=True):
        advantage = float(sample.advantages[-1])
        if sample.old_logprobs is None:
            total -= len(logprobs) * advantage
            continue
        old = sample.old_logprobs[-len(logprobs) :].tolist()
        gaps = [new - before for new, before in zip(logprobs, old, strict=True)]
        mean, product = sum(gaps) / len(gaps), math.prod(math.exp(gap) for gap in gaps)
        for part in (
            "all",
            sample.question.modality,
            *(["stale"] * (sample.policy_version < STEP)),
        ):
            gaps_of[part].append(gaps)
        weights = {
            "token": [math.exp(gap) for gap in gaps],
            "sequence": [product] * len(gaps),
            "geometric": [math.exp(mean)] * len(gaps),
        }[correction.level]
        truncated += [weight > correction.cap for weight in weights]
        bound, token_bound = correction.rejection_bound, correction.rejection_token_bound
        far = bool(bound) and not 1 / bound <= math.exp(mean) <= bound
        far |= bool(token_bound) and any(
            not 1 / token_bound <= math.exp(gap) <= token_bound for gap in gaps
        )
        rejected.append(far)
        for gap, weight in zip(gaps, weights, strict=True):
            if far:
                continue
            if correction.cap:  # the ratio is 1
                total -= min(weight, correction.cap) * advantage
            else:
                ratio = math.exp(gap)
                surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
                total -= max(surrogate, 10 * advantage) if advantage < 0 else surrogate
    measured = {}
    for part, responses in gaps_of.items():
        flat = [gap for gaps in responses for gap in gaps]
        end = "" if part == "all" else f"/{part}"
        measured[f"mismatch/gap{end}"] = sum(map(abs, flat)) / len(flat)
        measured[f"mismatch/gap_max{end}"] = max(map(abs, flat))
        measured[f"mismatch/kl{end}"] = sum(math.exp(gap) - 1 - gap for gap in flat) / len(flat)
    if correction.cap:
        measured["mismatch/truncated"] = sum(truncated) / len(truncated)
    if correction.rejects:
        measured["mismatch/rejected"] = sum(rejected)
        measured["mismatch/rejected_fraction"] = sum(rejected) / len(rejected)
    return total / sum(sample.num_loss_tokens for sample in samples), measured


def tolerance_of(name: str) -> float:
    return COARSE_TOLERANCE if name == "bfloat16" else TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Update]:
    (result,) = run_ranks(first_updates, 1, folder, ParallelConfig())
    return result


def test_losses_and_measurements_are_the_formulas(folder: Path, alone: dict[str, Update]) -> None:
    (trained,) = run_ranks(trained_logprobs, 1, folder)
    for name, (loss, _, means, measured) in alone.items():
        expected_loss, expected = naive(name, trained)
        assert loss == pytest.approx(expected_loss, abs=tolerance_of(name)), name
        found = {key: measured[key] for key in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=tolerance_of(name)), name
        if CORRECTIONS[name].cap:
            assert means["policy/ratio"] == pytest.approx(1.0, abs=TOLERANCE)
            assert 0 < measured["mismatch/truncated"] < 1
            assert means["policy/importance"] < CORRECTIONS[name].cap
        if CORRECTIONS[name].rejects:
            assert 0 < measured["mismatch/rejected"] < len(make_groups())
        assert ("mismatch/rejected" in measured) == CORRECTIONS[name].rejects
    assert alone["unknown"][2]["policy/importance"] == 1.0
    assert "mismatch/truncated" not in alone["unknown"][3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(folder: Path, alone: dict[str, Update], layout: str) -> None:
    for rank in run_ranks(first_updates, 2, folder, LAYOUTS[layout]):
        for name, (loss, norm, means, measured) in rank.items():
            tolerance = tolerance_of(name)
            assert loss == pytest.approx(alone[name][0], abs=tolerance)
            assert norm == pytest.approx(alone[name][1], rel=max(tolerance, 1e-4))
            assert means == pytest.approx(alone[name][2], abs=tolerance)
            assert measured == pytest.approx(alone[name][3], abs=tolerance)


def test_needed_only_where_something_is_unknown_or_corrected() -> None:
    known = samples_of("token")
    assert not need_old_logprobs(known, NO_CORRECTION)
    assert need_old_logprobs(samples_of("unknown"), NO_CORRECTION)
    for name, correction in CORRECTIONS.items():
        assert need_old_logprobs(known, correction) == (name != "unknown")

"""Old log-probs from the training forward pass: the ratio starts at 1, the importance weights are
the formula's, on any layout.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    build_policy,
    make_batches,
    make_groups,
    reduced,
)
from tests.support.training_example import write_tiny_folder as write_folder
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.experience import TrainingSample
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.old_logprobs import importance_weights, need_old_logprobs, with_old_logprobs

CAP = 1.2
# Two passes over the same tokens in float32, packed differently by another layout.
TOLERANCE = 2e-5
ONE_UPDATE = replace(TRAIN, updates_per_step=1)
LAYOUTS = {
    "data 2": ParallelConfig(),
    "tensor 2": ParallelConfig(tensor_model_parallel_size=2),
    "pipeline 2": ParallelConfig(pipeline_model_parallel_size=2),
    "context 2": ParallelConfig(context_parallel_size=2),
}


def unknown_samples() -> list[TrainingSample]:
    """Every second sample has old log-probs that nobody knows."""
    return [
        sample if index % 2 else replace(sample, old_logprobs=None)
        for index, sample in enumerate(make_groups())
    ]


def known_samples() -> list[TrainingSample]:
    return make_groups()


def first_updates(
    folder: Path, layout: ParallelConfig
) -> dict[str, tuple[float, float, dict[str, float]]]:
    """Return loss, gradient norm and means of one update without known log-probs, and of one with
    importance weights.
    """
    results = {}
    for name, samples, cap in (("unknown", unknown_samples, 0.0), ("weighted", known_samples, CAP)):
        case = Case(layout, train=ONE_UPDATE, samples=samples, share_prompts=True)
        policy = build_policy(folder, case)
        assert need_old_logprobs(samples(), cap)
        (update,) = policy.train_step(
            with_old_logprobs(policy, make_batches(case), 1.0, cap)
        ).updates
        results[name] = (update.loss, update.grad_norm, reduced(update))
    parallel.shutdown()
    return results


def expected_losses(folder: Path) -> dict[str, float]:
    """Return both losses by the formula from the log-probs of every token, all of them in one
    micro-batch.
    """
    expected = {}
    for name, samples in (("unknown", unknown_samples), ("weighted", known_samples)):
        case = Case(
            train=ONE_UPDATE, samples=samples, share_prompts=False, micro_batch_tokens=10_000
        )
        policy = build_policy(folder, case)
        (batch,) = make_batches(case)
        (microbatch,) = batch.microbatches
        (now,) = policy.compute_logprobs(batch)
        total = 0.0
        for index in microbatch.loss_mask.nonzero().flatten().tolist():
            logprob, old = float(now[index]), float(microbatch.old_logprobs[index])
            is_known = microbatch.unknown is None or not microbatch.unknown[index]
            advantage = float(microbatch.advantages[index])
            if name == "weighted":  # ratio 1, weighted by the old one's distance
                total -= min(np.exp(logprob - old), CAP) * advantage
            else:
                ratio = np.exp(logprob - old) if is_known else 1.0
                surrogate = min(ratio * advantage, float(np.clip(ratio, 0.8, 1.28)) * advantage)
                total -= max(surrogate, 10 * advantage) if advantage < 0 else surrogate
        expected[name] = total / batch.num_loss_tokens
    parallel.shutdown()
    return expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[float, float, dict[str, float]]]:
    (result,) = run_ranks(first_updates, 1, folder, ParallelConfig())
    return result


def test_losses_are_the_formulas(
    folder: Path, alone: dict[str, tuple[float, float, dict[str, float]]]
) -> None:
    (expected,) = run_ranks(expected_losses, 1, folder)
    for name, value in expected.items():
        assert alone[name][0] == pytest.approx(value, abs=TOLERANCE), name
    assert alone["weighted"][2]["policy/ratio"] == pytest.approx(1.0, abs=TOLERANCE)
    assert alone["weighted"][2]["policy/importance"] < CAP
    assert alone["unknown"][2]["policy/importance"] == 1.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(
    folder: Path, alone: dict[str, tuple[float, float, dict[str, float]]], layout: str
) -> None:
    for rank in run_ranks(first_updates, 2, folder, LAYOUTS[layout]):
        for name, (loss, norm, means) in rank.items():
            assert loss == pytest.approx(alone[name][0], abs=TOLERANCE)
            assert norm == pytest.approx(alone[name][1], rel=1e-4)
            assert means == pytest.approx(alone[name][2], abs=TOLERANCE)


def test_weights_by_hand() -> None:
    trained, sampled = (
        torch.log(torch.tensor([0.2, 0.5, 0.3])),
        torch.log(torch.tensor([0.4, 0.1, 1.0])),
    )
    weights = importance_weights(trained, sampled, torch.tensor([False, False, True]), 2.0)
    # 0.2 / 0.4, 0.5 / 0.1 = 5 held at 2, unknown
    assert weights.tolist() == pytest.approx([0.5, 2.0, 1.0])
    assert importance_weights(trained, sampled, None, 2.0).tolist() == pytest.approx(
        [0.5, 2.0, 0.3]
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_no_weight_is_made_of_what_is_not_finite(wrong: float) -> None:
    numbers, finite = torch.tensor([-1.0, wrong]), torch.tensor([-1.0, -2.0])
    for trained, sampled in ((numbers, finite), (finite, numbers)):
        first, second = importance_weights(trained, sampled, None, 2.0).tolist()
        assert first == 1.0
        assert math.isnan(second)


def test_needed_only_where_something_is_unknown_or_weighted() -> None:
    assert not need_old_logprobs(known_samples(), 0.0)
    assert need_old_logprobs(unknown_samples(), 0.0)
    assert need_old_logprobs(known_samples(), 2.0)

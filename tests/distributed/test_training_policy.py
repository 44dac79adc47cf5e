"""Updates against a plain PyTorch loop over the Hugging Face model; skipped updates, frozen parts,
supervised training.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    RandomMedia,
    build_policy,
    make_sample,
    naive_optimizer,
    naive_update,
    write_tiny_folder,
)
from zppo_mm.algorithms.logprobs import token_statistics
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig
from zppo_mm.errors import NotFiniteError
from zppo_mm.experience import Batch, TrainingSample
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.randomness import generator
from zppo_mm.training.batching import build_batches, plan_batches
from zppo_mm.training.objective import SupervisedObjective
from zppo_mm.training.policy import MAX_SKIPPED_IN_A_ROW, Policy
from zppo_mm.weights.mapping import load_hf_weights

# Two implementations of the network in float32, then three AdamW steps.
ORACLE_TOLERANCE = 1e-3
# Float32 sums over the vocabulary in another order.
TOLERANCE = 1e-5
ALGORITHM = AlgorithmConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


def text_samples() -> list[TrainingSample]:
    shapes = [(6, 14, 1.3), (9, 8, -0.8), (5, 11, 0.6), (7, 9, -1.1)]
    return [
        make_sample(f"g{n}", n, prompt, response, advantage, image=False)
        for n, (prompt, response, advantage) in enumerate(shapes)
    ]


def one_batch(samples: list[TrainingSample], skip: bool = True) -> list[Batch]:
    plan = plan_batches(
        samples,
        num_minibatches=1,
        num_replicas=parallel.data_size(),
        micro_batch_tokens=40,
        random=generator(0),
        skip_zero_advantage=skip,
    )
    media = RandomMedia() if parallel.is_first_stage() else None
    return build_batches(
        plan, samples, replica=parallel.data_rank(), media=media, device=parallel.device()
    )


def naive_logprobs(model: Any, sample: TrainingSample) -> torch.Tensor:
    """Return the log-prob of every token but the first, one sequence at a time."""
    ids = torch.from_numpy(sample.token_ids)[None]
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1)


def naive_updates(
    folder: Path, samples: list[TrainingSample], num_updates: int
) -> list[tuple[float, float]]:
    """Return loss and gradient norm of plain PyTorch updates: the surrogate of the paper, clipping,
    AdamW.
    """
    from transformers import Qwen3_5ForConditionalGeneration

    model = Qwen3_5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    optimizer, language = naive_optimizer(model)
    results = []
    for _ in range(num_updates):
        total = torch.zeros(())
        for sample in samples:
            mask = torch.from_numpy(sample.loss_mask)[1:]
            ratio = (
                naive_logprobs(model, sample) - torch.from_numpy(sample.old_logprobs)[1:]
            ).exp()
            advantage = torch.from_numpy(sample.advantages)[1:]
            clipped = ratio.clamp(1 - ALGORITHM.clip_ratio_low, 1 + ALGORITHM.clip_ratio_high)
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            bounded = torch.where(
                advantage < 0,
                torch.maximum(surrogate, ALGORITHM.clip_ratio_c * advantage),
                surrogate,
            )
            total = total - (bounded * mask).sum()
        count = sum(sample.num_loss_tokens for sample in samples)
        results.append(naive_update(optimizer, language, total / count))
    return results


def compare_with_naive(folder: Path) -> dict[str, Any]:
    samples = text_samples()
    policy = build_policy(folder, Case())
    batches = one_batch(samples)
    logprobs = torch.cat(policy.compute_logprobs(batches[0])).tolist()
    planned = [index for microbatch in plan_order(samples) for index in microbatch]
    updates = [policy.train_step(batches).updates[0] for _ in range(3)]
    parallel.shutdown()
    return {
        "ours": [(update.loss, update.grad_norm) for update in updates],
        "naive": naive_updates(folder, samples, 3),
        "logprobs": logprobs,
        "samples": [samples[index] for index in planned],
    }


def plan_order(samples: list[TrainingSample]) -> tuple[tuple[int, ...], ...]:
    plan = plan_batches(
        samples, num_minibatches=1, num_replicas=1, micro_batch_tokens=40, random=generator(0)
    )
    return plan.microbatches[0][0]


def test_updates_are_those_of_a_plain_loop(folder: Path) -> None:
    from transformers import Qwen3_5ForConditionalGeneration

    (result,) = run_ranks(compare_with_naive, 1, folder)
    for ours, naive in zip(result["ours"], result["naive"], strict=True):
        assert ours == pytest.approx(naive, rel=ORACLE_TOLERANCE)
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = [
            torch.cat([torch.zeros(1), naive_logprobs(model, s)]) * torch.from_numpy(s.loss_mask)
            for s in result["samples"]
        ]
    torch.testing.assert_close(
        torch.tensor(result["logprobs"]), torch.cat(expected), atol=1e-4, rtol=0
    )


class _Records(logging.Handler):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def weights_of(policy: Policy) -> torch.Tensor:
    return torch.cat(
        [parameter.detach().flatten().clone() for parameter in policy.model.parameters()]
    )


def skip_a_bad_update(folder: Path) -> dict[str, Any]:
    records = _Records()
    logging.getLogger("zppo_mm.training.policy").addHandler(records)
    policy = build_policy(folder, Case())
    good = text_samples()
    bad = [
        dataclasses.replace(
            good[0], uid="poisoned", advantages=good[0].advantages * np.float32(np.nan)
        ),
        *good[1:],
    ]
    before = weights_of(policy)
    metrics = policy.train_step([*one_batch(bad), *one_batch(good)][:1])
    untouched = torch.equal(before, weights_of(policy))
    after = policy.train_step(one_batch(good))
    parallel.shutdown()
    return {
        "skipped": metrics.num_skipped_updates,
        "loss": metrics.loss,
        "untouched": untouched,
        "messages": records.messages,
        "after": (after.num_skipped_updates, after.loss, after.grad_norm),
        "moved": not torch.equal(before, weights_of(policy)),
    }


def test_a_gradient_that_is_not_finite_skips_the_update_on_every_rank(folder: Path) -> None:
    first, second = run_ranks(skip_a_bad_update, 2, folder)
    for result in (first, second):
        assert result["skipped"] == 1
        assert math.isnan(result["loss"])
        assert result["untouched"]
        assert result["moved"]
        assert result["after"] == (
            0,
            pytest.approx(first["after"][1]),
            pytest.approx(first["after"][2]),
        )
    (message,) = first["messages"]
    assert "the update was skipped, their loss is not finite: groups " in message
    assert "poisoned" in message
    assert second["messages"] == []


def skip_until_the_end(folder: Path) -> tuple[list[bool], str, bool]:
    """Three spoilt updates, a good one, then spoilt ones: of the spoilt ones only one rank's
    samples are.
    """
    policy = build_policy(folder, Case())
    good = text_samples()
    spoilt = dataclasses.replace(
        good[0],
        uid="spoilt",
        old_logprobs=good[0].old_logprobs - np.float32(np.inf) * good[0].loss_mask,
    )
    skipped, message = [], ""
    before = weights_of(policy)
    try:
        for is_spoilt in [True] * 3 + [False] + [True] * 9:
            samples = [spoilt, *good[1:]] if is_spoilt else good
            skipped.append(bool(policy.train_step(one_batch(samples)).num_skipped_updates))
            if not is_spoilt:
                before = weights_of(policy)
    except NotFiniteError as error:
        message = str(error)
    untouched = torch.equal(before, weights_of(policy))
    parallel.shutdown()
    return skipped, message, untouched


@pytest.mark.filterwarnings("ignore:invalid value")
def test_skipped_updates_in_a_row_end_the_run_by_name_on_every_rank(folder: Path) -> None:
    for skipped, message, untouched in run_ranks(skip_until_the_end, 2, folder):
        assert skipped == [True] * 3 + [False] + [True] * (MAX_SKIPPED_IN_A_ROW - 1)
        assert (
            "training.policy: 4 updates in a row were skipped, got losses or gradients that are "
            "not finite" in message
        )
        assert untouched


def train_supervised(folder: Path) -> tuple[list[float], list[bool]]:
    """Learn one text and one image sample by heart with the vision tower frozen."""
    layout = ParallelConfig(tensor_model_parallel_size=2)
    parallel.initialize(layout, seed=0)
    model = build_model(load_architecture(folder), ModelConfig(), layout)
    load_hf_weights(model, folder)
    train = dataclasses.replace(TRAIN, freeze=["vision"], clip_grad=1.0)
    policy = Policy(model, train, layout, SupervisedObjective(parallel.tensor_group()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = [
        make_sample("a", 0, 4, 6, 0.0, image=True),
        make_sample("b", 1, 5, 7, 0.0, image=False),
    ]
    losses = [policy.train_step(one_batch(samples, skip=False)).loss for _ in range(8)]
    same = [
        torch.equal(before[name], parameter.detach())
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    parallel.shutdown()
    return losses, same


def test_supervised_training_learns_and_leaves_frozen_parts_alone(folder: Path) -> None:
    for losses, same in run_ranks(train_supervised, 2, folder):
        # A random model guesses: log 128 = 4.85 nats per token.
        assert losses[0] == pytest.approx(math.log(128), abs=0.5)
        assert losses[-1] < 0.5 * losses[0]
        assert same
        assert all(same)


def statistics_of_a_slice() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parallel.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    logits, rows, targets = whole_logits()
    mine = logits.chunk(2, dim=1)[parallel.tensor_rank()].clone().requires_grad_()
    logprobs, entropies = token_statistics(
        mine[rows], targets, parallel.tensor_group(), temperature=0.8, chunk_rows=4
    )
    (logprobs * targets + 3 * entropies).sum().backward()
    parallel.shutdown()
    assert mine.grad is not None
    return logprobs.detach(), entropies.detach(), mine.grad


def whole_logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(20, 50, generator=random)
    return (
        logits,
        torch.randperm(20, generator=random)[:13],
        torch.randint(50, (13,), generator=random),
    )


def test_split_log_probs_are_those_of_the_whole_softmax() -> None:
    (logprobs, entropies, left), (again, _, right) = run_ranks(statistics_of_a_slice, 2)
    logits, rows, targets = whole_logits()
    logits.requires_grad_()
    table = torch.log_softmax(logits[rows] / 0.8, -1)
    expected = table.gather(-1, targets[:, None]).squeeze(-1)
    expected_entropies = -(table.exp() * table).sum(-1)
    (expected * targets + 3 * expected_entropies).sum().backward()
    assert torch.equal(logprobs, again)
    torch.testing.assert_close(logprobs, expected.detach(), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(
        entropies, expected_entropies.detach(), atol=TOLERANCE, rtol=TOLERANCE
    )
    assert logits.grad is not None
    # The weights of the loss go up to 50.
    torch.testing.assert_close(
        torch.cat([left, right], 1), logits.grad, atol=50 * TOLERANCE, rtol=TOLERANCE
    )

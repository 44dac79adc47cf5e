"""Loss and gradient do not depend on the layout, on how micro-batches are cut, or on skipping
trivial samples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    Result,
    make_plan,
    make_samples,
    reduced,
    run_cases,
    write_tiny_folder,
)
from zppo_mm.config.schema import LoraConfig, ParallelConfig

# Float32 sums in another order, carried through four updates.
TOLERANCE = 2e-5
# Equal ones differ by 2e-7 here, a gradient missing one rank's part moves a weight by 4e-3.
WEIGHT_TOLERANCE = 1e-5

# One update with two images of 24 patches, which tensor ranks share.
TWO_MEDIA = Case(train=dataclasses.replace(TRAIN, updates_per_step=1), micro_batch_tokens=1000)
MEDIA_APART = dataclasses.replace(TWO_MEDIA, micro_batch_patches=24, recompute_vision="full")
ADAPTERS = dataclasses.replace(TWO_MEDIA, lora=LoraConfig(rank=4, also_train=["vision"]))

ALONE = {
    "reference": Case(),
    "one sample per micro-batch": Case(micro_batch_tokens=1),
    "one micro-batch": Case(micro_batch_tokens=1000),
    "trivial samples passed": Case(skip_zero_advantage=False),
    "two media": TWO_MEDIA,
    "media apart": MEDIA_APART,
    "tower recomputed": dataclasses.replace(TWO_MEDIA, recompute_vision="full"),
    "adapters": ADAPTERS,
    "adapters, tower recomputed": dataclasses.replace(ADAPTERS, recompute_vision="full"),
}
TWO_RANKS = {
    "data 2": Case(),
    "data 2, whole optimizer": Case(ParallelConfig(use_distributed_optimizer=False)),
    "data 2, overlapped": Case(ParallelConfig(overlap_grad_reduce=True)),
    "tensor 2": Case(ParallelConfig(tensor_model_parallel_size=2)),
    "tensor 2, sequence parallel": Case(
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    ),
    "tensor 2, tower recomputed": dataclasses.replace(
        ALONE["tower recomputed"], layout=ParallelConfig(tensor_model_parallel_size=2)
    ),
    "data 2, overlapped, media apart": dataclasses.replace(
        MEDIA_APART, layout=ParallelConfig(overlap_grad_reduce=True)
    ),
    "context 2": Case(ParallelConfig(context_parallel_size=2)),
    "context 2, whole optimizer": Case(
        ParallelConfig(context_parallel_size=2, use_distributed_optimizer=False)
    ),
    "pipeline 2": Case(ParallelConfig(pipeline_model_parallel_size=2)),
    "pipeline 2, small micro-batches": Case(
        ParallelConfig(pipeline_model_parallel_size=2), micro_batch_tokens=1
    ),
}
FOUR_RANKS = {
    "tensor 2 x pipeline 2": Case(
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    ),
    "pipeline 2 x data 2": Case(ParallelConfig(pipeline_model_parallel_size=2)),
    "context 2 x data 2": Case(ParallelConfig(context_parallel_size=2)),
    "context 2 x pipeline 2": Case(
        ParallelConfig(context_parallel_size=2, pipeline_model_parallel_size=2),
        micro_batch_tokens=1,
    ),
    # One of the four replicas has no sample in an update.
    "data 4": Case(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Result]:
    return dict(zip(ALONE, run_ranks(run_cases, 1, folder, list(ALONE.values()))[0], strict=True))


def assert_same(actual: Result, expected: Result, name: str, all_means: bool = True) -> None:
    for step, (one, other) in enumerate(zip(actual.metrics, expected.metrics, strict=True)):
        for update, (mine, reference) in enumerate(zip(one.updates, other.updates, strict=True)):
            where = f"{name}, step {step}, update {update}"
            assert not mine.skipped, where
            assert mine.loss == pytest.approx(reference.loss, rel=TOLERANCE, abs=TOLERANCE), where
            assert mine.grad_norm == pytest.approx(reference.grad_norm, rel=TOLERANCE), where
            assert mine.num_loss_tokens == reference.num_loss_tokens, where
            if all_means:
                assert reduced(mine) == pytest.approx(
                    reduced(reference), rel=TOLERANCE, abs=TOLERANCE
                ), where
    # Small parameters hardly show in the norm, but each must have got its whole gradient.
    if actual.whole_weights.keys() == expected.whole_weights.keys():
        for parameter, weights in expected.whole_weights.items():
            torch.testing.assert_close(
                actual.whole_weights[parameter],
                weights,
                atol=WEIGHT_TOLERANCE,
                rtol=0,
                msg=f"{name}: {parameter}",
            )


def test_the_example_has_a_replica_without_media_and_one_without_samples() -> None:
    samples = make_samples()
    with_media = [
        [any(samples[i].grids for mb in replica for i in mb) for replica in update]
        for update in make_plan(Case(), 2).microbatches
    ]
    assert [sorted(update) for update in with_media] == [[False, True]] * 2
    assert any(replica == () for replica in make_plan(Case(), 4).microbatches[0])


def test_the_reference_moves(alone: dict[str, Result]) -> None:
    first, second = alone["reference"].metrics
    assert all(update.grad_norm > 0.01 for update in first.updates)
    assert abs(second.loss - first.loss) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["one sample per micro-batch", "one micro-batch"])
def test_micro_batches_do_not_matter(alone: dict[str, Result], name: str) -> None:
    assert_same(alone[name], alone["reference"], name)


def test_skipping_trivial_samples_changes_neither_loss_nor_gradient(
    alone: dict[str, Result],
) -> None:
    name = "trivial samples passed"
    assert_same(alone[name], alone["reference"], name, all_means=False)
    full, short = alone[name].metrics[0].updates[0], alone["reference"].metrics[0].updates[0]
    assert (full.num_forward_tokens, short.num_forward_tokens) == (63, 46)
    assert reduced(full)["policy/clip_low"] == pytest.approx(reduced(short)["policy/clip_low"])


@pytest.mark.parametrize(("world_size", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_the_layout_does_not_matter(
    folder: Path, alone: dict[str, Result], world_size: int, cases: dict[str, Case]
) -> None:
    ranks = run_ranks(run_cases, world_size, folder, list(cases.values()))
    for results in ranks:
        for name, actual in zip(cases, results, strict=True):
            one_update = cases[name].train.updates_per_step == 1
            assert_same(actual, alone["two media" if one_update else "reference"], name)


def test_media_apart_and_recomputed_give_the_same_update(alone: dict[str, Result]) -> None:
    names = ("two media", "media apart", "tower recomputed")
    packs = [len(make_plan(ALONE[name], 1).microbatches[0][0]) for name in names]
    assert packs == [1, 2, 1]
    reference, apart, recomputed = (alone[name] for name in names)
    assert reference.metrics[0].updates[0].grad_norm > 0.01
    assert_same(apart, reference, "media apart")
    adapters = (alone["adapters"], alone["adapters, tower recomputed"])
    for kept, again in ((reference, recomputed), adapters):
        # The same operations in the same order: equal to the last bit.
        assert again.metrics[-1].loss == kept.metrics[-1].loss
        for name, weights in kept.whole_weights.items():
            assert torch.equal(again.whole_weights[name], weights), name

"""Ranks that hold media beside ranks that hold none, and updates without any: no rank waits for
another, no gradient is diluted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from data.question import MediaRef
from tests.support import tiny_families
from tests.support.launch import run_ranks
from tests.support.training_example import GRID, TRAIN, RandomMedia, make_sample, write_tiny_folder
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig
from zppo_mm.experience import TrainingSample
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.batching import BatchPlan, build_batches
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = pytest.mark.timeout(900)  # a start of four ranks takes minutes on a busy machine
# Float32 sums in another order, carried through six updates.
TOLERANCE = 2e-5
# Equal ones differ by 1e-6 here; a gradient halved by a replica without media moves a weight by
# 1e-3.
WEIGHT_TOLERANCE = 2e-5
JOB_TIMEOUT_SECONDS = 700.0

# Which samples each of two replicas passes, in which micro-batches, update by update. Odd samples
# have no media.
Packs = tuple[tuple[int, ...], ...]
UPDATES: dict[str, tuple[Packs, Packs]] = {
    "one replica is text only": (((0, 2),), ((1,), (3,))),
    "text beside media in one replica": (((1,), (0,), (3,)), ((2, 5),)),
    "no media anywhere": (((1,), (3,)), ((5,),)),
}
FOUR_RANK_LAYOUTS = {
    "tensor x data": ParallelConfig(tensor_model_parallel_size=2),
    "tensor x data, sequence parallel": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True
    ),
    "pipeline x data": ParallelConfig(pipeline_model_parallel_size=2),
}
TWO_RANK_LAYOUTS = {
    "data, overlapped": ParallelConfig(overlap_grad_reduce=True),
    "tensor, sequence parallel": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True
    ),
}
# With the language model frozen the gradient is the tower's alone, so that a part of it that is
# lost cannot hide in the norm.
FREEZES: tuple[tuple[str, ...], ...] = ((), ("language",), ("vision", "projector"))
FAMILIES = ("qwen3_5", "qwen3_vl")


@dataclass(frozen=True)
class Trained:
    """What came of one case.

    Attributes:
        updates: Loss and gradient norm.
        weights: The trained ones that every tensor rank holds whole, by name; of a pipeline's
            stages, which count layers from 0, the tower's.
    """

    updates: list[tuple[float, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        "qwen3_5": write_tiny_folder(root / "qwen3_5"),
        "qwen3_vl": tiny_families.folder("qwen3_vl", root / "qwen3_vl")[0],
    }


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[tuple[str, tuple[str, ...]], Trained]:
    return run_ranks(train_everything, 1, folders, {"alone": ParallelConfig()})[0]["alone"]


def make_samples() -> list[TrainingSample]:
    """Return six samples; of those with media the first has two images, which tensor ranks share
    between them.
    """
    shapes = [(8, 12, 1.5), (6, 9, -0.7), (5, 7, 0.9), (6, 5, 1.1), (4, 7, -1.2), (7, 8, 0.8)]
    samples = [make_sample(f"s{n}", n, *shape, image=n % 2 == 0) for n, shape in enumerate(shapes)]
    first = samples[0]
    second_image = make_sample("s0", 9, 0, 0, 0.0, image=True).token_ids
    ids = torch.cat([torch.from_numpy(second_image), torch.from_numpy(first.token_ids)]).numpy()
    wider = {
        name: torch.cat(
            [torch.zeros(len(second_image)), torch.from_numpy(getattr(first, name))]
        ).numpy()
        for name in ("loss_mask", "old_logprobs", "advantages")
    }
    samples[0] = dataclasses.replace(
        first,
        question=dataclasses.replace(
            first.question, media=(MediaRef("image", "none.tar", "s0", "png"),) * 2
        ),
        token_ids=ids,
        positions=torch.arange(len(ids)).expand(3, -1).numpy(),
        grids=(GRID, GRID),
        **wider,
    )
    return samples


def make_plan(num_replicas: int) -> BatchPlan:
    """Return the updates as they stand, for two replicas or all on one."""
    samples = make_samples()
    replicas = [
        (one, other) if num_replicas == 2 else (one + other,) for one, other in UPDATES.values()
    ]
    tokens = [
        sum(samples[index].num_loss_tokens for part in update for pack in part for index in pack)
        for update in replicas
    ]
    return BatchPlan((), tuple(tokens), tuple(map(float, tokens)), tuple(replicas), 0)


def train_everything(
    folders: dict[str, Path], layouts: dict[str, ParallelConfig]
) -> dict[str, dict[tuple[str, tuple[str, ...]], Trained]]:
    results = {
        name: {
            (family, freeze): train(folders[family], layout, freeze)
            for family in FAMILIES
            for freeze in FREEZES
        }
        for name, layout in layouts.items()
    }
    parallel.shutdown()
    return results


def train(folder: Path, layout: ParallelConfig, freeze: tuple[str, ...]) -> Trained:
    """Make every update twice."""
    parallel.initialize(layout, seed=0)
    model = build_model(load_architecture(folder), ModelConfig(), layout)
    load_hf_weights(model, folder)
    config = dataclasses.replace(TRAIN, freeze=list(freeze))
    policy = Policy(
        model, config, layout, PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
    )
    media = RandomMedia() if parallel.is_first_stage() else None
    plan = make_plan(parallel.data_size())
    batches = build_batches(
        plan, make_samples(), replica=parallel.data_rank(), media=media, device=parallel.device()
    )
    metrics = [policy.train_step(batches) for _ in range(2)]
    whole = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not getattr(parameter, "tensor_model_parallel", False)
        if parallel.pipeline_size() == 1 or name.startswith("vision.")
    }
    return Trained(
        [(update.loss, update.grad_norm) for step in metrics for update in step.updates], whole
    )


def test_the_example_is_what_its_names_say() -> None:
    has_media = [bool(sample.grids) for sample in make_samples()]
    assert has_media == [True, False] * 3
    held = {
        name: [[any(has_media[i] for i in pack) for pack in part] for part in parts]
        for name, parts in UPDATES.items()
    }
    assert held == {
        "one replica is text only": [[True], [False, False]],
        "text beside media in one replica": [[False, True, False], [True]],
        "no media anywhere": [[False, False], [False]],
    }


def test_the_reference_trains_the_tower(alone: dict[tuple[str, tuple[str, ...]], Trained]) -> None:
    for (family, freeze), trained in alone.items():
        norms = [norm for _loss, norm in trained.updates]
        if freeze == ("language",):
            # Only the tower trains, and without media it has no gradient at all.
            assert [norm > 1e-3 for norm in norms] == [True, True, False] * 2, family
            assert norms[2] == norms[5] == 0.0
        else:
            assert min(norms) > 1e-2, (family, freeze)


@pytest.mark.parametrize(("world_size", "layouts"), [(2, TWO_RANK_LAYOUTS), (4, FOUR_RANK_LAYOUTS)])
def test_loss_and_gradient_are_those_of_one_process(
    folders: dict[str, Path],
    alone: dict[tuple[str, tuple[str, ...]], Trained],
    world_size: int,
    layouts: dict[str, ParallelConfig],
) -> None:
    for results in run_ranks(
        train_everything, world_size, folders, layouts, timeout_seconds=JOB_TIMEOUT_SECONDS
    ):
        for layout, cases in results.items():
            for case, actual in cases.items():
                where = f"{layout}, {case}"
                for mine, reference in zip(actual.updates, alone[case].updates, strict=True):
                    assert mine == pytest.approx(reference, rel=TOLERANCE, abs=TOLERANCE), where
                for name in actual.weights.keys() & alone[case].weights.keys():
                    torch.testing.assert_close(
                        actual.weights[name],
                        alone[case].weights[name],
                        atol=WEIGHT_TOLERANCE,
                        rtol=0,
                        msg=f"{where}: {name}",
                    )

"""Training on a GPU: a bf16 update against the same in float32, its checkpoint, a whole run, and
what offloading frees.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import gpu_checks
from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    build_policy,
    make_batches,
    make_groups,
    run_cases,
    write_tiny_folder,
)
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import checkpoint
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.optimizer_state import parameter_shards
from zppo_mm.training.policy import Policy
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# bfloat16 has 8 bits of mantissa; a few layers of rounding reach a few percent of a loss of size
# 0.3.
LOSS_TOLERANCE = 0.03
NORM_TOLERANCE = 0.1


def update(folder: Path, dtype: str, target: Path) -> tuple[list[float], list[float], list[float]]:
    """Return losses and gradient norms of a step, and the losses of the next step after a
    reload.
    """
    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    model = build_model(load_architecture(folder), ModelConfig(params_dtype=dtype), layout)
    load_hf_weights(model, folder)
    policy = Policy(
        model, TRAIN, layout, PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
    )
    batches = make_batches(Case())
    metrics = policy.train_step(batches)
    checkpoint.save(target / dtype, 1, policy, {"step": 1}, keep=1)
    expected = [item.loss for item in policy.train_step(batches).updates]
    assert checkpoint.load_latest(target / dtype, policy) == {"step": 1}
    again = [item.loss for item in policy.train_step(batches).updates]
    assert again == pytest.approx(expected, rel=LOSS_TOLERANCE)
    parallel.shutdown()
    return (
        [item.loss for item in metrics.updates],
        [item.grad_norm for item in metrics.updates],
        again,
    )


def test_a_bf16_update_is_close_to_float32(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "hf")
    ((losses, norms, _),) = run_ranks(update, 1, folder, "float32", tmp_path)
    ((half_losses, half_norms, _),) = run_ranks(update, 1, folder, "bfloat16", tmp_path)
    assert half_losses[0] == pytest.approx(losses[0], abs=LOSS_TOLERANCE)
    assert half_norms[0] == pytest.approx(norms[0], rel=NORM_TOLERANCE)


def default_layout_moves(folder: Path) -> tuple[str, float, float]:
    """Return where the weights live and two losses, with everything on `auto`."""
    policy = build_policy(folder, Case())
    batches = make_batches(Case())
    first, second = policy.train_step(batches), policy.train_step(batches)
    where = next(policy.model.parameters()).device.type
    parallel.shutdown()
    return where, first.loss, second.loss


def test_the_default_trains_on_the_gpu(tmp_path: Path) -> None:
    ((where, first, second),) = run_ranks(
        default_layout_moves, 1, write_tiny_folder(tmp_path / "hf")
    )
    assert where == "cuda"
    assert second < first


def test_a_bfloat16_run_saves_resumes_and_exports(tmp_path: Path) -> None:
    gpu_checks.run_in_bfloat16(tmp_path)


def updates_with_and_without_sharing(folder: Path) -> list[tuple[float, float]]:
    """Return loss and gradient norm of an update without and with shared prompts."""
    cases = [
        Case(samples=make_groups, share_prompts=shared, params_dtype="bfloat16")
        for shared in (False, True)
    ]
    firsts = [result.metrics[0].updates[0] for result in run_cases(folder, cases)]
    return [(first.loss, first.grad_norm) for first in firsts]


def test_shared_prompts_change_no_update(tmp_path: Path) -> None:
    ((apart, shared),) = run_ranks(
        updates_with_and_without_sharing, 1, write_tiny_folder(tmp_path / "hf")
    )
    assert shared[0] == pytest.approx(apart[0], abs=LOSS_TOLERANCE)
    assert shared[1] == pytest.approx(apart[1], rel=NORM_TOLERANCE)


def offloaded_bytes(folder: Path) -> tuple[int, int]:
    """Return how much device memory an update's block takes, and what the state and the buffers
    are.
    """
    policy = build_policy(folder, Case(ParallelConfig(offload_optimizer=True)))
    policy.train_step(make_batches(Case()))
    before = torch.cuda.memory_allocated()
    with policy.optimizer_on_device():
        taken = torch.cuda.memory_allocated() - before
        state = sum(
            tensor.nbytes
            for shard in parameter_shards(policy.optimizer)
            for tensor in shard.tensors().values()
        )
    gradients = sum(parameter.main_grad.nbytes for parameter in policy.model.parameters())
    parallel.shutdown()
    return taken, state + gradients


def test_an_offloaded_optimizer_leaves_the_gpu(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "hf")
    ((taken, held),) = run_ranks(offloaded_bytes, 1, folder)
    # Gradient buffers are padded.
    assert held <= taken

"""Offloaded optimizer state: nothing of it on the device between updates, and every update,
checkpoint and resumed run as without it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    build_policy,
    make_batches,
    write_tiny_folder,
)
from zppo_mm.config.schema import AlgorithmConfig, LoraConfig, ModelConfig, ParallelConfig
from zppo_mm.lora.adapters import add_lora
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import checkpoint
from zppo_mm.training.manifest import read_manifest
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.optimizer_state import parameter_shards
from zppo_mm.training.policy import Policy
from zppo_mm.weights.mapping import load_hf_weights

WHOLE = ParallelConfig(use_distributed_optimizer=False)
TENSOR = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PIPELINE = ParallelConfig(pipeline_model_parallel_size=2, overlap_grad_reduce=True)
HALF = replace(TRAIN, optimizer_state_dtype="bfloat16")
CASES = {
    "sharded, bfloat16": Case(params_dtype="bfloat16"),
    "whole, bfloat16 moments": Case(WHOLE, params_dtype="bfloat16", train=HALF),
    "tensor, float32": Case(TENSOR),
    "pipeline, whole, float32": Case(replace(PIPELINE, use_distributed_optimizer=False)),
    "adapters": Case(params_dtype="bfloat16"),
}


def build(folder: Path, case: Case, offload: bool, lora: bool) -> Policy:
    layout = replace(case.layout, offload_optimizer=offload)
    parallel.initialize(layout, seed=0)
    model = build_model(
        load_architecture(folder), ModelConfig(params_dtype=case.params_dtype), layout
    )
    load_hf_weights(model, folder)
    if lora:
        add_lora(model, LoraConfig(rank=4), seed=0)
    objective = PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
    return Policy(model, case.train, layout, objective)


def bytes_held(policy: Policy) -> tuple[int, int]:
    """Return the bytes of optimizer state beside the weights, and of gradient buffers."""
    state = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for shard in parameter_shards(policy.optimizer)
        for tensor in shard.tensors().values()
    }
    buffers = [buffer.grad_data for buffer in policy._wrapped.buffers]
    return sum(state.values()), sum(buffer.untyped_storage().nbytes() for buffer in buffers)


def train(folder: Path, target: Path, case: Case, offload: bool, lora: bool) -> dict[str, Any]:
    """Train, save, resume in another policy and train on."""
    policy = build(folder, case, offload, lora)
    batches = make_batches(case)
    held = [bytes_held(policy)]
    losses = [policy.train_step(batches).loss]
    policy.compute_logprobs(batches[0])
    held.append(bytes_held(policy))
    path = checkpoint.save(target, 1, policy, {"step": 1}, keep=1)
    held.append(bytes_held(policy))
    with policy.optimizer_on_device():
        present = bytes_held(policy)
    resumed = build(folder, case, offload, lora)
    checkpoint.load(path, resumed)
    held.append(bytes_held(resumed))
    losses.append(resumed.train_step(batches).loss)
    return {
        "losses": losses,
        "held": held,
        "present": present,
        "files": read_manifest(path, checkpoint.STATE_FILE),
        "weights": [parameter.detach().clone() for parameter in resumed.model.parameters()],
    }


def compare(folder: Path, root: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, case in CASES.items():
        kept, away = (
            train(folder, root / str(offload) / name, case, offload, name == "adapters")
            for offload in (False, True)
        )
        found[name] = {
            "same losses": kept["losses"] == away["losses"],
            "same weights": all(map(torch.equal, kept["weights"], away["weights"])),
            # The pickled description differs by which equal strings are one object.
            "other files": [
                file
                for file, checksum in kept["files"].items()
                if away["files"].get(file) != checksum and file != ".metadata"
            ],
            "left on the device": set(away["held"]),
            "present for updates": away["present"] == kept["present"] == kept["held"][0],
            "something to offload": min(kept["present"]) > 0,
        }
    parallel.shutdown()
    return found


@pytest.mark.timeout(600)
def test_offloading_changes_nothing_but_where_the_state_is(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "hf")
    for found in run_ranks(compare, 2, folder, tmp_path):
        for name, result in found.items():
            assert result == {
                "same losses": True,
                "same weights": True,
                "other files": [],
                "left on the device": {(0, 0)},
                "present for updates": True,
                "something to offload": True,
            }, name
        assert set(found) == set(CASES)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_what_fails_an_update_is_what_is_raised(tmp_path: Path, params_dtype: str) -> None:
    """An optimizer that fails leaves moments in the type of the update, not of the state."""
    layout = ParallelConfig(offload_optimizer=True)
    case = Case(layout, params_dtype=params_dtype, train=HALF)
    policy = build_policy(write_tiny_folder(tmp_path), case)
    batches = make_batches(case)
    policy.train_step(batches)

    def fail(*_: Any) -> None:
        raise MemoryError("no room for the update")

    (inner,) = {id(part.optimizer): part.optimizer for part in _chained(policy)}.values()
    hook = inner.register_step_pre_hook(fail)
    with pytest.raises(MemoryError, match="no room for the update"):
        policy.train_step(batches)
    assert bytes_held(policy)[1] == 0
    hook.remove()
    assert math.isfinite(policy.train_step(batches).loss)


def _chained(policy: Policy) -> list[Any]:
    return [part for part in policy.optimizer.chained_optimizers if not part.is_stub_optimizer]

"""Moments kept in bfloat16: an update is that of float32 on rounded moments, with either optimizer
and on any rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    build_policy,
    make_batches,
    write_tiny_folder,
)
from zppo_mm.config.schema import LoraConfig, ParallelConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.optimizer_state import parameter_shards
from zppo_mm.training.policy import Policy

MOMENTS = ("exp_avg", "exp_avg_sq")
NUM_UPDATES = 3
CASES = {
    "sharded": Case(),
    "whole": Case(ParallelConfig(use_distributed_optimizer=False)),
    "tensor": Case(ParallelConfig(tensor_model_parallel_size=2)),
    "adapters": Case(lora=LoraConfig(rank=4)),
}


def round_moments(policy: Policy) -> None:
    for part in parameter_shards(policy.optimizer):
        for name in MOMENTS:
            part.state[name].copy_(part.state[name].bfloat16())


def train(
    folder: Path, case: Case, params_dtype: str, state_dtype: str, by_hand: bool
) -> tuple[list[torch.Tensor], set[torch.dtype]]:
    """Make some updates; returns this rank's weights and the types of its moments."""
    settings = replace(TRAIN, updates_per_step=1, optimizer_state_dtype=state_dtype)
    case = replace(case, train=settings, params_dtype=params_dtype)
    policy = build_policy(folder, case)
    batches = make_batches(case)
    for _ in range(NUM_UPDATES):
        policy.train_step(batches)
        if by_hand:
            round_moments(policy)
    types = {
        part.state[name].dtype for part in parameter_shards(policy.optimizer) for name in MOMENTS
    }
    return [parameter.detach().clone() for parameter in policy.model.parameters()], types


def compare(folder: Path) -> dict[tuple[str, str], tuple[bool, bool, set[torch.dtype]]]:
    """Return by type of the weights and case whether kept moments do what rounding by hand does,
    whether they change anything, and their types.
    """
    found = {}
    for params_dtype in ("float32", "bfloat16"):
        for name, case in CASES.items():
            kept, types = train(folder, case, params_dtype, "bfloat16", False)
            rounded, _ = train(folder, case, params_dtype, "float32", True)
            exact, _ = train(folder, case, params_dtype, "float32", False)
            found[params_dtype, name] = (
                all(map(torch.equal, kept, rounded)),
                all(map(torch.equal, kept, exact)),
                types,
            )
    parallel.shutdown()
    return found


def test_updates_are_those_of_float32_on_rounded_moments(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    for found in run_ranks(compare, 2, folder):
        assert found == {
            (params_dtype, name): (True, False, {torch.bfloat16})
            for params_dtype in ("float32", "bfloat16")
            for name in CASES
        }

"""Checkpoints: resume, other layouts, damage, and pruning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    Case,
    build_policy,
    make_batches,
    write_tiny_folder,
)
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import CheckpointError
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import checkpoint
from zppo_mm.training.checkpoint_files import RANDOM_FILE, STATE_FILE
from zppo_mm.training.policy import Policy
from zppo_mm.weights.megatron_folder import save_entries

DTYPES = ("float32", "bfloat16")
MOMENTS = "bfloat16 moments"
"""Weights and moments in bfloat16."""
# Float32 sums in another order, carried through an update; bfloat16 rounds every activation to 8
# bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, MOMENTS: 3e-2}
# The same of a whole tensor of the optimizer, against its norm.
STATE_TOLERANCE = {"float32": 5e-3, "bfloat16": 0.3, MOMENTS: 0.3}
LAYOUTS = {
    "data": ParallelConfig(),
    "tensor": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pipeline": ParallelConfig(pipeline_model_parallel_size=2),
    "context": ParallelConfig(context_parallel_size=2),
    "data whole": ParallelConfig(use_distributed_optimizer=False),
    "tensor whole": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=False
    ),
    "pipeline whole": ParallelConfig(
        pipeline_model_parallel_size=2, use_distributed_optimizer=False
    ),
    "context whole": ParallelConfig(context_parallel_size=2, use_distributed_optimizer=False),
}
FOUR_RANKS = {
    "data whole": ParallelConfig(use_distributed_optimizer=False),
    "tensor and data": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pipeline and data": ParallelConfig(pipeline_model_parallel_size=2),
    "tensor and pipeline": ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    ),
}
SECTIONS = ("query", "key", "value", "z", "beta", "alpha")
STATE = {"step": 1, "stream": {"delivered": [3, 4]}, "replay": [{"id": "q", "accuracy": 0.1 + 0.2}]}


def make_case(layout: ParallelConfig, dtype: str) -> Case:
    if dtype != MOMENTS:
        return Case(layout, params_dtype=dtype)
    train = replace(TRAIN, optimizer_state_dtype="bfloat16")
    return Case(layout, params_dtype="bfloat16", train=train)


def held(policy: Policy) -> dict[str, dict[str, torch.Tensor]]:
    """Return what the optimizer on this rank has of every parameter, by name, matched by the memory
    that both use.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    mains = [
        (part, main)
        for part in policy.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for main in group["params"]
    ]
    for name, parameter in policy.model.named_parameters():
        start, end = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
        for part, main in mains:
            if main is getattr(parameter, "main_param", None) or start <= main.data_ptr() < end:
                state = part.optimizer.state[main]
                values = {
                    "main": main.detach(),
                    "exp_avg": state["exp_avg"],
                    "exp_avg_sq": state["exp_avg_sq"],
                    "step": state["step"],
                }
                found[name] = {key: value.clone() for key, value in values.items()}
    assert len(found) == len(mains)
    return found


def same(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the names whose tensors are not bit for bit the same."""
    assert set(first) == set(second)
    return [name for name in first if not (same_tensors(first[name], second[name]))]


def same_tensors(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return all(same_tensors(first[key], second[key]) for key in first)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


def plain(path: Path) -> dict[str, torch.Tensor]:
    """Return all whole tensors of a checkpoint, by megatron-core's own reader."""
    found: dict[str, torch.Tensor] = dist_checkpointing.load_plain_tensors(str(path))
    return found


def far_off(
    found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float
) -> dict[str, float]:
    """Return the tensors that differ by more than rounding, with the difference."""
    assert set(found) == set(reference)
    gaps = {
        name: float((found[name].float() - whole.float()).norm() / whole.float().norm())
        for name, whole in reference.items()
    }
    return {name: gap for name, gap in gaps.items() if not gap <= tolerance}


def misplaced(stored: dict[str, torch.Tensor], policy: Policy) -> list[str]:
    """Return the parameters whose state does not stand in a checkpoint under their name; for a rank
    that holds all of them.
    """
    wrong, entries = [], save_entries(policy.model)
    for name, values in held(policy).items():
        copied = policy.model.get_parameter(name).dtype == torch.bfloat16
        for key in ("exp_avg", "exp_avg_sq", *(("param",) if copied else ())):
            start = f"optimizer.state.{key}.{entries[name].key}"
            parts = (
                [stored[start]]
                if start in stored
                else [stored[f"{start}.{part}"] for part in SECTIONS if f"{start}.{part}" in stored]
            )
            mine = values["main" if key == "param" else key]
            if not torch.equal(torch.cat(parts).flatten(), mine.flatten()):
                wrong.append(f"{key} of {name}")
    return wrong


def load_train(model: Path, target: Path, case: Case) -> tuple[dict[str, Any] | None, list[float]]:
    policy = build_policy(model, case)
    state = checkpoint.load_latest(target, policy)
    return state, [update.loss for update in policy.train_step(make_batches(case)).updates]


def go_round(
    model: Path, root: Path, dtype: str, layouts: dict[str, ParallelConfig]
) -> dict[str, dict[str, Any]]:
    """Train and save at every layout with either optimizer; load each there and at the next, and
    save it from there again.
    """
    results: dict[str, dict[str, Any]] = {}
    kept: dict[str, Any] = {}
    for name, layout in layouts.items():
        case = make_case(layout, dtype)
        policy = build_policy(model, case)
        batches = make_batches(case)
        policy.train_step(batches)
        kept[name] = (held(policy), weights(policy))
        checkpoint.save(root / dtype / name, 1, policy, STATE, keep=2)
        result: dict[str, Any] = {
            "losses": [update.loss for update in policy.train_step(batches).updates]
        }
        policy = build_policy(model, case)
        result["state"] = checkpoint.load_latest(root / dtype / name, policy)
        result["changed"] = same(kept[name][0], held(policy)) + same(kept[name][1], weights(policy))
        result["resumed"] = [update.loss for update in policy.train_step(batches).updates]
        results[name] = result
    stored = {name: plain(root / dtype / name / "step_000001") for name in layouts}
    names = list(layouts)
    for name, following in zip(names, names[1:] + names[:1], strict=True):
        policy = build_policy(model, make_case(layouts[following], dtype))
        checkpoint.load(root / dtype / name / "step_000001", policy)
        results[name]["moved"] = same(
            stored[name], plain(checkpoint.save(root / dtype / "again", 1, policy, STATE, keep=1))
        )
        results[name]["off"] = far_off(stored[name], stored["data whole"], STATE_TOLERANCE[dtype])
    policy = build_policy(model, make_case(layouts["data whole"], dtype))
    for name in names:
        checkpoint.load(root / dtype / name / "step_000001", policy)
        results[name]["misplaced"] = misplaced(stored[name], policy)
    return results


def save_and_load(
    model: Path, root: Path, dtypes: tuple[str, ...], layouts: dict[str, ParallelConfig]
) -> dict[str, dict[str, Any]]:
    results = {dtype: go_round(model, root, dtype, layouts) for dtype in dtypes}
    parallel.shutdown()
    return results


def check_round(results: dict[str, dict[str, Any]]) -> None:
    for dtype, by_layout in results.items():
        for name, result in by_layout.items():
            found = {key: result[key] for key in ("state", "changed", "moved", "misplaced", "off")}
            assert found == {
                "state": STATE,
                "changed": [],
                "moved": [],
                "misplaced": [],
                "off": {},
            }, (dtype, name)
            assert result["losses"] == pytest.approx(
                by_layout["data whole"]["losses"], rel=TOLERANCE[dtype]
            ), (dtype, name)
            assert result["resumed"] == result["losses"], (dtype, name)


def load_on_one_rank(model: Path, root: Path) -> dict[tuple[str, str], Any]:
    results = {
        (dtype, name): load_train(model, root / dtype / name, Case(params_dtype=dtype))
        for dtype in DTYPES
        for name in LAYOUTS
    }
    parallel.shutdown()
    return results


def test_a_checkpoint_continues_at_every_layout_with_either_optimizer(
    student_folder: Path, tmp_path: Path
) -> None:
    two = run_ranks(save_and_load, 2, student_folder, tmp_path, DTYPES, LAYOUTS)
    for results in two:
        assert {dtype: set(found) for dtype, found in results.items()} == {
            key: set(LAYOUTS) for key in DTYPES
        }
        check_round(results)
    reference = {dtype: two[0][dtype]["data whole"]["losses"] for dtype in DTYPES}
    (one,) = run_ranks(load_on_one_rank, 1, student_folder, tmp_path)
    assert len(one) == len(DTYPES) * len(LAYOUTS)
    for (dtype, name), (state, losses) in one.items():
        assert state == STATE, (dtype, name)
        assert losses == pytest.approx(reference[dtype], rel=TOLERANCE[dtype]), (dtype, name)


def test_a_bfloat16_checkpoint_continues_where_two_kinds_of_layout_meet(tmp_path: Path) -> None:
    # A large embedding, which the distributed optimizer cuts between replicas on both stages that
    # have a copy.
    folder = write_tiny_folder(tmp_path / "model", vocabulary=2048)
    for results in run_ranks(save_and_load, 4, folder, tmp_path, ("bfloat16",), FOUR_RANKS):
        assert set(results["bfloat16"]) == set(FOUR_RANKS)
        check_round(results)


def test_moments_in_bfloat16_continue_bit_for_bit(student_folder: Path, tmp_path: Path) -> None:
    layouts = {name: LAYOUTS[name] for name in ("data", "tensor whole", "data whole")}
    for results in run_ranks(save_and_load, 2, student_folder, tmp_path, (MOMENTS,), layouts):
        assert set(results[MOMENTS]) == set(layouts)
        check_round(results)


def prune_and_damage(model: Path, target: Path) -> dict[str, Any]:
    """Save four checkpoints, then damage the kept ones one after the other."""
    policy = build_policy(model, Case())
    batches = make_batches(Case())
    results: dict[str, Any] = {"nothing saved": checkpoint.load_latest(target, policy)}
    losses = []
    for step in range(1, 5):
        losses.append(policy.train_step(batches).loss)
        checkpoint.save(target, step, policy, {"step": step}, keep=2)
    results["kept"] = sorted(path.name for path in target.iterdir())
    weights = next((target / "step_000004").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    state = checkpoint.load_latest(target, policy)
    results["fallback"] = state
    results["after the fallback"] = policy.train_step(batches).loss
    results["expected"] = losses[3]
    results["names"] = sorted(path.name for path in target.iterdir())
    (target / "step_000003" / STATE_FILE).unlink()
    try:
        checkpoint.load_latest(target, policy)
    except CheckpointError as error:
        results["error"] = str(error)
    checkpoint.save(target, 4, policy, {"step": 4}, keep=2)
    checkpoint.save(target, 4, policy, {"step": 4, "again": True}, keep=2)
    results["saved again"] = checkpoint.load_latest(target, policy)
    parallel.shutdown()
    return results


def test_damage_falls_back_and_pruning_keeps_the_newest(
    student_folder: Path, tmp_path: Path
) -> None:
    (results,) = run_ranks(prune_and_damage, 1, student_folder, tmp_path)
    assert results["nothing saved"] is None
    assert results["kept"] == ["step_000003", "step_000004"]
    assert results["fallback"] == {"step": 3}
    assert results["after the fallback"] == pytest.approx(
        results["expected"], rel=TOLERANCE["float32"]
    )
    assert results["names"] == ["step_000003", "step_000004.broken"]
    assert "no usable checkpoint" in results["error"]
    assert (
        f"step_000003/{STATE_FILE}: the checkpoint is incomplete, got no file" in results["error"]
    )
    assert results["saved again"] == {"step": 4, "again": True}


def fail_to_read(model: Path, target: Path) -> list[Any]:
    """Save twice; then a file of the newer one is damaged, and another one cannot be read for a
    while.
    """
    policy = build_policy(model, Case())
    for step in (1, 2):
        checkpoint.save(target, step, policy, {"step": step}, keep=2)
    newest = target / "step_000002"
    hidden, damaged = newest / STATE_FILE, newest / RANDOM_FILE
    results: list[Any] = []
    if parallel.rank() == 0:
        damaged.write_bytes(b"")
        hidden.rename(target / "hidden")
        hidden.symlink_to(hidden)  # reading it fails with an error of the system's, whoever reads
    parallel.barrier()
    try:
        checkpoint.load_latest(target, policy)
    except CheckpointError as error:
        results.append(str(error))
    results.append(sorted(path.name for path in target.glob("step_*")))
    parallel.barrier()
    if parallel.rank() == 0:
        hidden.unlink()
        (target / "hidden").rename(hidden)
    parallel.barrier()
    results += [
        checkpoint.load_latest(target, policy),
        sorted(path.name for path in target.glob("step_*")),
    ]
    parallel.shutdown()
    return results


def test_a_disk_that_cannot_be_read_now_is_not_damage(student_folder: Path, tmp_path: Path) -> None:
    for error, names, state, names_after in run_ranks(fail_to_read, 2, student_folder, tmp_path):
        assert "the checkpoint's files cannot be used, got [Errno 40]" in error
        assert names == ["step_000001", "step_000002"]
        # Now the damage is certain.
        assert state == {"step": 1}
        assert names_after == ["step_000001", "step_000002.broken"]


def test_only_completed_folders_count(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") is None
    for name in (
        ".step_000009.partial",
        "step_000008.broken",
        "step_x",
        "step_000002",
        "step_000010",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000011").write_text(json.dumps("a file"))
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"

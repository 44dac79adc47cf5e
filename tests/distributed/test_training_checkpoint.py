"""Checkpoints: resume, other layouts, damage, pruning and a kill in the middle of a save."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.training_example import Case, build_policy, make_batches, write_tiny_folder
from zppo_mm.config import ParallelConfig
from zppo_mm.errors import CheckpointError
from zppo_mm.models import parallel
from zppo_mm.training import checkpoint

# Float32 sums in another order, carried through an update.
TOLERANCE = 2e-5
LAYOUTS = {
    "data": ParallelConfig(),
    "whole": ParallelConfig(use_distributed_optimizer=False),
    "tensor": ParallelConfig(tensor_model_parallel_size=2),
    "pipeline": ParallelConfig(pipeline_model_parallel_size=2),
    "context": ParallelConfig(context_parallel_size=2),
}
STATE = {"step": 1, "stream": {"delivered": [3, 4]}, "replay": [{"id": "q", "accuracy": 0.1 + 0.2}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


def train_save_train(model: Path, target: Path, layout: ParallelConfig) -> list[float]:
    """Make a step, save, make another; returns the losses of the second."""
    policy = build_policy(model, Case(layout))
    batches = make_batches(Case(layout))
    policy.train_step(batches)
    checkpoint.save(target, 1, policy, STATE, keep=2)
    return [update.loss for update in policy.train_step(batches).updates]


def load_train(model: Path, target: Path, layout: ParallelConfig) -> tuple[dict[str, Any] | None, list[float]]:
    policy = build_policy(model, Case(layout))
    state = checkpoint.load_latest(target, policy)
    return state, [update.loss for update in policy.train_step(make_batches(Case(layout))).updates]


def save_and_load_on_two_ranks(model: Path, root: Path) -> dict[str, tuple[list[float], Any]]:
    results = {}
    for name, layout in LAYOUTS.items():
        expected = train_save_train(model, root / name, layout)
        results[name] = (expected, load_train(model, root / name, layout))
    # Each is opened at another layout too.
    results["tensor as pipeline"] = (results["tensor"][0], load_train(model, root / "tensor", LAYOUTS["pipeline"]))
    results["context as data"] = (results["context"][0], load_train(model, root / "context", LAYOUTS["data"]))
    results["tensor as context"] = (results["tensor"][0], load_train(model, root / "tensor", LAYOUTS["context"]))
    results["data as tensor"] = (results["data"][0], load_train(model, root / "data", LAYOUTS["tensor"]))
    parallel.shutdown()
    return results


def load_on_one_rank(model: Path, root: Path) -> dict[str, Any]:
    results = {
        name: load_train(model, root / name, layout)
        for name, layout in {**LAYOUTS, **dict.fromkeys(("tensor", "pipeline", "context"), ParallelConfig())}.items()
    }
    parallel.shutdown()
    return results


def test_a_checkpoint_continues_at_every_layout(folder: Path, tmp_path: Path) -> None:
    two = run_ranks(save_and_load_on_two_ranks, 2, folder, tmp_path)
    reference = two[0]["data"][0]
    for results in two:
        for name, (expected, (state, losses)) in results.items():
            assert state == STATE, name
            assert expected == pytest.approx(reference, rel=TOLERANCE), name
            assert losses == pytest.approx(expected, rel=TOLERANCE), name
    (one,) = run_ranks(load_on_one_rank, 1, folder, tmp_path)
    assert set(one) == set(LAYOUTS)
    for name, (state, losses) in one.items():
        assert state == STATE, name
        assert losses == pytest.approx(reference, rel=TOLERANCE), name


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
    (target / "step_000003" / checkpoint.STATE_FILE).unlink()
    try:
        checkpoint.load_latest(target, policy)
    except CheckpointError as error:
        results["error"] = str(error)
    checkpoint.save(target, 4, policy, {"step": 4}, keep=2)
    checkpoint.save(target, 4, policy, {"step": 4, "again": True}, keep=2)
    results["saved again"] = checkpoint.load_latest(target, policy)
    parallel.shutdown()
    return results


def test_damage_falls_back_and_pruning_keeps_the_newest(folder: Path, tmp_path: Path) -> None:
    (results,) = run_ranks(prune_and_damage, 1, folder, tmp_path)
    assert results["nothing saved"] is None
    assert results["kept"] == ["step_000003", "step_000004"]
    assert results["fallback"] == {"step": 3}
    assert results["after the fallback"] == pytest.approx(results["expected"], rel=TOLERANCE)
    assert results["names"] == ["step_000003", "step_000004.broken"]
    assert "no usable checkpoint" in results["error"]
    assert f"step_000003/{checkpoint.STATE_FILE}: the checkpoint is incomplete, got no file" in results["error"]
    assert results["saved again"] == {"step": 4, "again": True}


def fail_to_read(model: Path, target: Path) -> list[Any]:
    """Save twice; then a file of the newer one is damaged, and another one cannot be read for a while."""
    policy = build_policy(model, Case())
    for step in (1, 2):
        checkpoint.save(target, step, policy, {"step": step}, keep=2)
    newest = target / "step_000002"
    hidden, damaged = newest / checkpoint.STATE_FILE, newest / checkpoint.RANDOM_FILE
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
    results += [checkpoint.load_latest(target, policy), sorted(path.name for path in target.glob("step_*"))]
    parallel.shutdown()
    return results


def test_a_disk_that_cannot_be_read_now_is_not_damage(folder: Path, tmp_path: Path) -> None:
    for error, names, state, names_after in run_ranks(fail_to_read, 2, folder, tmp_path):
        assert "the checkpoint's files cannot be used, got [Errno 40]" in error
        assert names == ["step_000001", "step_000002"]
        # Now the damage is certain.
        assert state == {"step": 1}
        assert names_after == ["step_000001", "step_000002.broken"]


def save_until_killed(model: Path, target: Path, sign: str) -> None:
    policy = build_policy(model, Case())
    checkpoint.save(target, 1, policy, {"step": 1}, keep=1)
    threading.Thread(target=kill_this_process_at, args=(target / sign,), daemon=True).start()
    checkpoint.save(target, 2, policy, {"step": 2}, keep=1)


def kill_this_process_at(sign: Path) -> None:
    while not sign.exists():
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def resume_and_save(model: Path, targets: list[Path]) -> list[tuple[dict[str, Any] | None, list[str]]]:
    policy = build_policy(model, Case())
    results = []
    for target in targets:
        state = checkpoint.load_latest(target, policy)
        checkpoint.save(target, 2, policy, {"step": 2}, keep=1)
        results.append((state, sorted(path.name for path in target.iterdir())))
    parallel.shutdown()
    return results


def test_a_kill_during_a_save_leaves_the_previous_checkpoint(folder: Path, tmp_path: Path) -> None:
    signs = [".step_000002.partial", f".step_000002.partial/{checkpoint.STATE_FILE}"]
    targets = [tmp_path / "at the start", tmp_path / "at the end"]
    for target, sign in zip(targets, signs, strict=True):
        ((code, output),) = run_ranks(save_until_killed, 1, folder, target, sign, check=False)
        assert code == -signal.SIGKILL, output
        assert checkpoint.latest(target) == target / "step_000001"
        assert (target / ".step_000002.partial").is_dir()
    (results,) = run_ranks(resume_and_save, 1, folder, targets)
    assert results == [({"step": 1}, ["step_000002"])] * 2


def test_only_completed_folders_count(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") is None
    for name in (".step_000009.partial", "step_000008.broken", "step_x", "step_000002", "step_000010"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000011").write_text(json.dumps("a file"))
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000010"

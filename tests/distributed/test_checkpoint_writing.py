"""Checkpoints are written while training goes on: what is saved, when it counts, and what a full
disk or a kill leaves.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from tests.support.launch import run_ranks
from tests.support.training_example import Case, build_policy, make_batches
from zppo_mm.errors import CheckpointError
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import checkpoint
from zppo_mm.training.checkpoint_files import STATE_FILE
from zppo_mm.training.checkpoint_writer import CheckpointWriter
from zppo_mm.training.optimizer_state import parameter_shards

CASE = Case(params_dtype="bfloat16")
PATIENCE_SECONDS = 60.0
SMALL_FILE = 20_000


class HeldDisk:
    """A disk that lets the first bytes of a background writer pass on request."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self._save = torch.save
        torch.save = self._wait_and_save

    def _wait_and_save(self, *arguments: Any, **options: Any) -> None:
        if threading.current_thread().name == "checkpoint writer":
            assert self.let_go.wait(PATIENCE_SECONDS)
        self._save(*arguments, **options)


def snapshot(policy: Any) -> list[torch.Tensor]:
    tensors = [parameter.detach() for parameter in policy.model.parameters()]
    tensors += [
        tensor for part in parameter_shards(policy.optimizer) for tensor in part.tensors().values()
    ]
    return [tensor.clone() for tensor in tensors]


def is_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(*pair) for pair in zip(first, second, strict=True)
    )


def draws() -> torch.Tensor:
    """Draw from the process's generator and from Megatron's stream for dropout; every rank has its
    own.
    """
    first = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        return torch.cat([first, torch.rand(4)])


def train_while_writing(model: Path, target: Path) -> dict[str, Any]:
    policy, batches, disk, results = build_policy(model, CASE), make_batches(CASE), HeldDisk(), {}
    complete: list[int] = []
    writer = CheckpointWriter(target, 2, complete.append)
    policy.train_step(batches)
    before = snapshot(policy)
    torch.manual_seed(parallel.rank())
    state = {"step": 1, "list": [1]}
    writer.save(1, policy, state)
    state["list"].append(2)
    expected = draws()
    if parallel.rank() == 1:
        disk.let_go.set()
    policy.train_step(batches)
    results["training moved on"] = not is_same(before, snapshot(policy))
    time.sleep(0.2)
    writer.notice()
    results["one rank is not all"] = (checkpoint.latest(target), list(complete))
    parallel.barrier()
    disk.let_go.set()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while checkpoint.latest(target) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    results["complete before anybody asks"] = (checkpoint.latest(target), list(complete))
    while not complete and time.monotonic() < deadline:
        writer.notice()
    results["noticed"] = list(complete)
    results["state"] = checkpoint.load_latest(target, policy)
    results["as it was saved"] = is_same(before, snapshot(policy))
    results["drawn"] = (torch.equal(draws(), expected), expected)
    # The next save waits for the one under way; the last one is waited for.
    writer.save(2, policy, {"step": 2})
    writer.save(3, policy, {"step": 3})
    writer.finish()
    writer.finish()
    results["after two more"] = (sorted(path.name for path in target.iterdir()), list(complete))
    parallel.barrier()
    results["full"] = save_on_a_full_disk(policy, writer, target)
    writer.save(5, policy, {"step": 5})
    writer.finish()
    results["room again"] = (sorted(path.name for path in target.iterdir()), list(complete))
    parallel.shutdown()
    return results


def save_on_a_full_disk(
    policy: Any, writer: CheckpointWriter, target: Path
) -> tuple[str, list[str]]:
    """Save where rank 1 alone has no room; returns the error and what is left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if parallel.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
    try:
        writer.save(4, policy, {"step": 4})
        writer.finish()
    except CheckpointError as error:
        parallel.barrier()
        left = sorted(path.name for path in target.iterdir())
        parallel.barrier()
        return str(error), left
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "", []


def test_training_goes_on_while_a_checkpoint_is_written(
    student_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "checkpoints"
    ranks = run_ranks(train_while_writing, 2, student_folder, target)
    assert not torch.equal(*(results["drawn"][1] for results in ranks))
    for results in ranks:
        assert results["drawn"][0]
        assert results["training moved on"]
        assert results["one rank is not all"] == (None, [])
        assert results["complete before anybody asks"] == (target / "step_000001", [])
        assert results["noticed"] == [1]
        assert results["state"] == {"step": 1, "list": [1]}
        assert results["as it was saved"]
        assert results["after two more"] == (["step_000002", "step_000003"], [1, 2, 3])
        message, left = results["full"]
        assert (
            "checkpoint: a rank could not write its file, got OSError: [Errno 27] File too large, "
            "expected room" in message
        )
        assert left == ["step_000002", "step_000003"]
        assert results["room again"] == (["step_000003", "step_000005"], [1, 2, 3, 5])


def train_until_killed(model: Path, target: Path, sign: str) -> None:
    policy, batches = build_policy(model, CASE), make_batches(CASE)
    writer = CheckpointWriter(target, 1)
    writer.save(1, policy, {"step": 1})
    writer.finish()
    hold_before_complete(2)
    threading.Thread(target=kill_this_process_at, args=(target / sign,), daemon=True).start()
    while True:
        writer.save(2, policy, {"step": 2})
        policy.train_step(batches)


def hold_before_complete(step: int) -> None:
    """Keep a checkpoint from being complete, however late its process is killed."""
    rename = Path.rename

    def hold(path: Path, target: Path) -> Path:
        if path.name == f".step_{step:06d}.partial":
            threading.Event().wait()
        return rename(path, target)

    Path.rename = hold  # type: ignore[assignment, method-assign]


def kill_this_process_at(sign: Path) -> None:
    while not (sign.exists() and (sign.is_dir() or sign.stat().st_size)):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def resume_and_save(
    model: Path, targets: list[Path]
) -> list[tuple[dict[str, Any] | None, list[str]]]:
    policy = build_policy(model, CASE)
    results = []
    for target in targets:
        state = checkpoint.load_latest(target, policy)
        checkpoint.save(target, 2, policy, {"step": 2}, keep=1)
        results.append((state, sorted(path.name for path in target.iterdir())))
    parallel.shutdown()
    return results


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    student_folder: Path, tmp_path: Path
) -> None:
    signs = ["", "/__0_0.distcp", f"/{STATE_FILE}"]
    targets = [tmp_path / str(number) for number, _ in enumerate(signs)]
    for target, sign in zip(targets, signs, strict=True):
        ((code, output),) = run_ranks(
            train_until_killed,
            1,
            student_folder,
            target,
            f".step_000002.partial{sign}",
            check=False,
        )
        assert code == -signal.SIGKILL, output
        assert checkpoint.latest(target) == target / "step_000001"
        assert (target / ".step_000002.partial").is_dir()
    # Killed between the two renames of a checkpoint that is saved a second time.
    target = tmp_path / "replaced"
    (tmp_path / "0" / "step_000001").rename(tmp_path / "0" / ".step_000001.replaced")
    (tmp_path / "0").rename(target)
    (results,) = run_ranks(resume_and_save, 1, student_folder, [target, *targets[1:]])
    assert results == [({"step": 1}, ["step_000002"])] * 3

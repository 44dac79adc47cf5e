"""One folder per save: weights, optimizer and schedule in Megatron's distributed format, and everything else of the run beside them.

A checkpoint is written next to its place and renamed when it is complete, synced to disk and listed in a manifest. A process killed at any
moment therefore leaves the previous checkpoint as it was, and at most a hidden unfinished folder that the next save removes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

# megatron-core's writer needs psutil and, without it, waits for ever for a child that has died.
import psutil  # noqa: F401
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from zppo_mm.errors import CheckpointError
from zppo_mm.models import parallel
from zppo_mm.models.megatron_versions import load_checkpoint, save_checkpoint
from zppo_mm.training.manifest import MANIFEST_FILE, DamagedCheckpointError, check_file, checksum, read_manifest
from zppo_mm.training.policy import Policy

T = TypeVar("T")
logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
STATE_FILE = "state.json"
RANDOM_FILE = "random.pt"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
# The only sharding of optimizer state that megatron-core can save and also load at another tensor, pipeline and data size.
_SHARDING = "fully_reshardable"
_HYPERPARAMETERS = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay")


def save(folder: Path, step: int, policy: Policy, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove the oldest beyond `keep`. Every rank calls it.

    Args:
        folder: Holds the checkpoints of a run, on storage that all ranks share.
        step: Rollout steps done.
        policy: Weights, optimizer and schedule.
        state: Everything else that a resumed run needs, as JSON values, the same on every rank.
        keep: Complete checkpoints left afterwards, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: A file cannot be written; the previous checkpoints are as they were.
    """
    target = folder / f"step_{step:06d}"
    partial = folder / f".{target.name}.partial"
    _on_rank_0(partial, lambda: _make_empty(partial))
    _keep_results_in_process()
    save_checkpoint(_sharded_state(policy, is_loading=False), partial, _metadata())
    random_states = _gather_random_states()
    _on_rank_0(partial, lambda: _write_rest(partial, state, random_states))
    sums = _on_all_ranks(partial, lambda: _seal_share(partial))
    _on_rank_0(partial, lambda: _publish(partial, target, [entry for share in sums for entry in share], keep))
    if parallel.rank() == 0:
        logger.info("checkpoint: saved %s", target)
    return target


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint that was completed, `None` if there is none."""
    complete = _step_folders(folder)
    return complete[-1] if complete else None


def load_latest(folder: Path, policy: Policy) -> dict[str, Any] | None:
    """Load the newest usable checkpoint. Every rank calls it.

    A checkpoint with a missing or damaged file is named in a warning and renamed to end in `.broken`, if one before it is usable.

    Returns:
        The `state` that was saved with it; `None` if nothing was saved yet.

    Raises:
        CheckpointError: There are checkpoints but none is usable, one cannot be read now, or a sound one does not fit the model.
    """
    found = _on_all_ranks(folder, lambda: _step_folders(folder) if parallel.rank() == 0 else [])[0]
    damaged: list[tuple[Path, DamagedCheckpointError]] = []
    for path in reversed(found):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        for each, problem in damaged:
            _set_aside(each, problem)
        return load(path, policy)
    if damaged:
        # Nothing is renamed: the next start must find the same, and not a run that has no checkpoint yet.
        raise CheckpointError(
            f"checkpoint: no usable checkpoint in {folder}, got {len(damaged)} broken ({damaged[0][1]}), expected at least one complete; "
            "restore one from a copy, or remove the run's folder to start again"
        )
    return None


def _set_aside(path: Path, error: CheckpointError) -> None:
    if parallel.rank() == 0:
        logger.warning("checkpoint: %s is set aside: %s", path, error)
    _on_rank_0(path, lambda: _replace(path, path.with_name(f"{path.name}.broken")))


def load(path: Path, policy: Policy) -> dict[str, Any]:
    """Load one checkpoint into the policy, whatever layout it was saved at. Learning rate and decay stay as configured now.

    Args:
        path: A folder that `verify` accepts.
        policy: Overwritten in place.

    Returns:
        The `state` that was saved with it.

    Raises:
        CheckpointError: Its contents do not fit the model or the optimizer, or a newer megatron-core wrote it.
    """
    configured = [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in policy.optimizer.param_groups]
    try:
        loaded = load_checkpoint(_sharded_state(policy, is_loading=True), path)
        policy.model.load_state_dict(loaded["model"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
    except (dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint does not fit, got {type(error).__name__}: {error}, expected the weights and the optimizer of this "
            "model; resume with the model, train.freeze and parallel.use_distributed_optimizer that it was saved with"
        ) from error
    for group, values in zip(policy.optimizer.param_groups, configured, strict=True):
        group.update(values)
    policy.scheduler.load_state_dict(loaded["scheduler"])
    _restore_random_states(path / RANDOM_FILE)
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    return state


def verify(path: Path) -> None:
    """Compare every file with the manifest, each rank its share. Every rank calls it.

    Raises:
        DamagedCheckpointError: On every rank, naming the first file that is missing or damaged.
        CheckpointError: On every rank, if a file cannot be read now, which says nothing about the checkpoint.
    """
    _on_all_ranks(path, lambda: _verify_share(path))


def _keep_results_in_process() -> None:
    """Have the writers report through a queue of this process.

    megatron-core starts a manager process for that, in case the save is asynchronous. Ours is not, and that process would outlive a killed
    run and keep its output pipes open.
    """
    if getattr(filesystem_async, "_results_queue", None) is None:
        writer: Any = filesystem_async
        writer._results_queue = queue.SimpleQueue()


def _metadata() -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"distrib_optim_sharding_type": _SHARDING, "chained_optim_avoid_prefix": True, "dp_cp_group": group}


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    model: Any = policy.model
    weights = model.sharded_state_dict(metadata=_metadata())
    optimizer = policy.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_metadata())
    return {"model": weights, "optimizer": optimizer, "scheduler": policy.scheduler.state_dict()}


def _step_folders(folder: Path) -> list[Path]:
    """Return the completed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_rest(partial: Path, state: dict[str, Any], random_states: list[bytes]) -> None:
    (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    torch.save([torch.frombuffer(bytearray(item), dtype=torch.uint8) for item in random_states], partial / RANDOM_FILE)


def _files(path: Path) -> list[str]:
    return sorted(str(item.relative_to(path)) for item in path.rglob("*") if item.is_file() and item.name != MANIFEST_FILE)


def _seal_share(partial: Path) -> list[tuple[str, int, int]]:
    """Sync this rank's share of the files to disk; returns name, size in bytes and checksum of each."""
    entries = []
    for name in _files(partial)[parallel.rank() :: parallel.world_size()]:
        _sync(partial / name)
        entries.append((name, (partial / name).stat().st_size, checksum(partial / name)))
    return entries


def _publish(partial: Path, target: Path, entries: list[tuple[str, int, int]], keep: int) -> None:
    """Write the manifest, put the folder in its place, then prune; the rename is the moment at which the checkpoint exists."""
    listed = {name: {"size": size, "crc32": checksum} for name, size, checksum in sorted(entries)}
    (partial / MANIFEST_FILE).write_text(json.dumps(listed, indent=1), encoding="utf-8")
    _sync(partial / MANIFEST_FILE)
    _sync(partial)
    _replace(partial, target)
    for old in _step_folders(target.parent)[: -max(keep, 1)]:
        # Renamed first, so that a half-removed folder never looks like a checkpoint.
        _replace(old, old.with_name(f".{old.name}.removed"))
        shutil.rmtree(old.with_name(f".{old.name}.removed"))
    for leftover in target.parent.glob(".step_*.*"):
        shutil.rmtree(leftover)


def _replace(source: Path, target: Path) -> None:
    """Rename a folder, over another if there is one."""
    if target.exists():
        aside = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    source.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _verify_share(path: Path) -> None:
    listed = read_manifest(path, STATE_FILE)
    for name in sorted(listed)[parallel.rank() :: parallel.world_size()]:
        check_file(path, name, listed[name])


def _gather_random_states() -> list[bytes]:
    """Return the torch random states of every rank, by rank."""
    box = io.BytesIO()
    torch.save({"torch": torch.get_rng_state(), "streams": get_cuda_rng_tracker().get_states()}, box)
    states: list[Any] = [None] * parallel.world_size()
    dist.all_gather_object(states, box.getvalue())
    return states


def _restore_random_states(path: Path) -> None:
    """Continue the random streams; on another number of ranks they start from the seed, as nothing there corresponds to them."""
    states = torch.load(path, weights_only=True)
    if len(states) != parallel.world_size():
        logger.info("checkpoint: saved on %d ranks, the dropout streams start anew on %d", len(states), parallel.world_size())
        return
    mine = torch.load(io.BytesIO(states[parallel.rank()].numpy().tobytes()), weights_only=True)
    torch.set_rng_state(mine["torch"])
    get_cuda_rng_tracker().set_states(mine["streams"])


def _on_rank_0(path: Path, action: Callable[[], None]) -> None:
    """Run a file operation on rank 0; a failure raises on every rank instead of leaving the others waiting."""
    _on_all_ranks(path, action if parallel.rank() == 0 else lambda: None)


def _on_all_ranks(path: Path, action: Callable[[], T]) -> list[T]:
    """Run a file operation on every rank and return all results, by rank.

    Raises:
        CheckpointError: It failed on at least one rank; raised on all.
    """

    def attempt() -> tuple[T | None, CheckpointError | None]:
        try:
            return action(), None
        except CheckpointError as error:
            return None, error
        except OSError as error:
            return None, CheckpointError(
                f"{path}: the checkpoint's files cannot be used, got {error}, expected room and permission; check the disk"
            )

    outcomes = parallel.on_all_ranks(attempt)
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        # One file that cannot be read now makes the damage of another uncertain.
        raise min(problems, key=lambda problem: isinstance(problem, DamagedCheckpointError))
    return cast(list[T], [result for result, _ in outcomes])

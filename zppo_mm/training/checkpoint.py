"""One folder per save: weights, optimizer and schedule in Megatron's distributed format, and
everything else of the run beside them.

A checkpoint is written beside its final name, while training goes on
(`zppo_mm.training.checkpoint_writer`), and renamed when it is complete, synced to disk and listed
in a manifest. A process killed at any moment therefore leaves the previous checkpoint as it was,
and at most a hidden unfinished folder that the next save removes. Each rank writes and reads about
its own shards, of which it holds one copy in host memory until it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.atomic_files import replace_folder
from data.errors import DataError
from zppo_mm.errors import CheckpointError, ZppoError
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import optimizer_state
from zppo_mm.training.checkpoint_files import (
    STATE_FILE,
    put_back,
    step_folders,
)
from zppo_mm.training.checkpoint_reading import (
    broadcast_shards,
    choose_readers,
    read_small_files,
    read_tensors,
    shards_to_read,
)
from zppo_mm.training.checkpoint_writer import CheckpointWriter
from zppo_mm.training.manifest import DamagedCheckpointError, check_file, read_manifest
from zppo_mm.training.policy import Policy
from zppo_mm.training.random_states import restore_random_states
from zppo_mm.weights.distributed_folder import (
    on_every_rank,
    on_rank_0,
)
from zppo_mm.weights.megatron_folder import save_entries
from zppo_mm.weights.tensor_shards import shards_of

T = TypeVar("T")
logger = logging.getLogger(__name__)

_NEW_RUN = "use another checkpoint, or give the new run another name"


def save(folder: Path, step: int, policy: Policy, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and wait for it, then remove the oldest beyond `keep`; see
    `CheckpointWriter`. Every rank calls it.

    Raises:
        CheckpointError: A file cannot be written; the previous checkpoints are as they were.
    """
    writer = CheckpointWriter(folder, keep)
    target = writer.save(step, policy, state)
    writer.finish()
    return target


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint that was completed, `None` if there is none."""
    complete = step_folders(folder)
    return complete[-1] if complete else None


def load_latest(
    folder: Path, policy: Policy, check: Callable[[dict[str, Any]], object] = lambda state: None
) -> dict[str, Any] | None:
    """Load the newest usable checkpoint. Every rank calls it.

    A checkpoint with a missing or damaged file is named in a warning and renamed to end in
    `.broken`, if one before it is usable.

    Args:
        folder: Of the checkpoints.
        policy: Overwritten in place.
        check: Called with the `state` before anything is overwritten; raises on every rank if it
            is not to be loaded.

    Returns:
        The `state` that was saved with it; `None` if nothing was saved yet.

    Raises:
        CheckpointError: There are checkpoints but none is usable, one cannot be read now, or a
            sound one does not fit the model.
    """
    on_rank_0(folder, partial(put_back, folder))
    found = parallel.broadcast_object(step_folders(folder) if parallel.rank() == 0 else None)
    damaged: list[tuple[Path, DamagedCheckpointError]] = []
    for path in reversed(found):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        for each, problem in damaged:
            _set_aside(each, problem)
        return load(path, policy, check)
    if damaged:
        # Nothing is renamed: the next start must find the same, and not a run that has no
        # checkpoint yet.
        raise CheckpointError(
            f"checkpoint: no usable checkpoint in {folder}, got {len(damaged)} broken "
            f"({damaged[0][1]}), expected at least one complete; restore one from a copy, or "
            "start with --restart, which moves the run aside"
        )
    return None


def _set_aside(path: Path, error: CheckpointError) -> None:
    if parallel.rank() == 0:
        logger.warning("checkpoint: %s is set aside: %s", path, error)
    on_rank_0(path, lambda: replace_folder(path, path.with_name(f"{path.name}.broken")))


def load(
    path: Path, policy: Policy, check: Callable[[dict[str, Any]], object] = lambda state: None
) -> dict[str, Any]:
    """Load one checkpoint into the policy, whatever layout it was saved at. Learning rate and decay
    stay as configured now.

    Args:
        path: A folder that `verify` accepts.
        policy: Overwritten in place.
        check: As of `load_latest`.

    Returns:
        The `state` that was saved with it.

    Raises:
        CheckpointError: Its contents do not fit the model or the optimizer, or a newer
            megatron-core wrote it.
    """
    schedule, random_states, state = on_every_rank(path, partial(read_small_files, path))
    with translate_value_errors(path):
        check(state)
    entries = save_entries(policy.model)
    found = optimizer_state.parameter_shards(policy.optimizer)
    weights = [shard for entry in entries.values() for shard in shards_of(entry)]
    with torch.no_grad(), policy.optimizer_on_device():
        states = optimizer_state.shards(entries, found)
        keys = {shard.key for shard in weights + states}
        wanted = set().union(*parallel.gather_from_ranks(keys))
        readers = choose_readers(weights)
        on_every_rank(
            path, partial(read_tensors, path, wanted, [*shards_to_read(weights, readers), *states])
        )
        broadcast_shards(weights, readers)
    with translate_value_errors(path):
        optimizer_state.set_num_updates(policy.optimizer, found, schedule["num_updates"])
        policy.scheduler.load_state_dict(schedule["scheduler"])
        restore_random_states(random_states)
    return state


@contextmanager
def translate_value_errors(path: Path) -> Iterator[None]:
    """Translate the errors of unusable values in a checkpoint's small files; no collective is
    called inside the block.

    Raises:
        CheckpointError: The values are not those that a run of this version saves.
    """
    try:
        yield
    except (ZppoError, DataError):
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        got = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path}: cannot be used, got {got}, expected what a run of this version saves; "
            f"{_NEW_RUN}"
        ) from error


def verify(path: Path) -> None:
    """Compare every file with the manifest, each rank its part of the files. Every rank calls it.

    Raises:
        DamagedCheckpointError: On every rank, naming the first file that is missing or damaged.
        CheckpointError: On every rank, if a file cannot be read now, which says nothing about the
            checkpoint.
    """
    on_every_rank(path, lambda: _verify_own_files(path))


def _verify_own_files(path: Path) -> None:
    listed = read_manifest(path, STATE_FILE)
    damage: DamagedCheckpointError | None = None
    for name in sorted(listed)[parallel.rank() :: parallel.world_size()]:
        try:
            check_file(path, name, listed[name])
        except DamagedCheckpointError as error:
            # Another file may not be readable now, which makes this uncertain.
            damage = damage or error
    if damage is not None:
        raise damage

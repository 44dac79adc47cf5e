"""One folder per save: weights, optimizer and schedule in Megatron's distributed format, and
everything else of the run beside them.

A checkpoint is written beside its final name, while training goes on, and renamed when it is
complete, synced to disk and listed in a manifest. A process killed at any moment therefore leaves
the previous checkpoint as it was, and at most a hidden unfinished folder that the next save
removes. Each rank writes and reads about its own shards, of which it holds one copy in host memory
until it is written.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
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
    RANDOM_FILE,
    SCHEDULE_FILE,
    STATE_FILE,
    folder_of_step,
    make_empty,
    publish,
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
from zppo_mm.training.file_exchange import FileExchange
from zppo_mm.training.manifest import DamagedCheckpointError, check_file, read_manifest
from zppo_mm.training.policy import Policy
from zppo_mm.training.random_states import gather_random_states, restore_random_states
from zppo_mm.weights.distributed_folder import (
    WrittenFile,
    on_every_rank,
    on_rank_0,
    plan_writes,
    write_chunks,
    write_description,
)
from zppo_mm.weights.megatron_folder import save_entries
from zppo_mm.weights.tensor_shards import WriteChunk, chunks_of, object_chunks, shards_of

T = TypeVar("T")
logger = logging.getLogger(__name__)

_NEW_RUN = "use another checkpoint, or give the new run another name"


class CheckpointWriter:
    """Writes the checkpoints of a run while training goes on. Every rank calls its methods
    together, from the thread that trains.

    A checkpoint is complete as soon as all ranks have written their files, whatever the training
    thread does then. A run that is to end calls `finish` last, wherever it was interrupted between
    two collectives.

    Args:
        folder: Holds the checkpoints of a run, on storage that all ranks share.
        keep: Complete checkpoints left after a save, at least 1.
        on_complete: Called with the step of every checkpoint that has become complete, by `notice`
            or `finish`.
    """

    def __init__(
        self, folder: Path, keep: int, on_complete: Callable[[int], None] = lambda step: None
    ) -> None:
        self._folder, self._keep, self._on_complete = folder, keep, on_complete
        self._pending: tuple[int, Path, Future[None]] | None = None

    def save(
        self,
        step: int,
        policy: Policy,
        state: dict[str, Any],
        own_files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Finish the save before, copy what is to be saved, and begin to write it.

        Args:
            step: Rollout steps done.
            policy: Weights, optimizer and schedule.
            state: Everything else that a resumed run needs, as JSON values, the same on every rank.
            own_files: Further files of this rank, by names that no other rank has.

        Returns:
            Where the checkpoint will be.

        Raises:
            CheckpointError: This save or the one before cannot be written; complete checkpoints are
                as they were.
        """
        self.finish()
        target = folder_of_step(self._folder, step)
        partial_folder = self._folder / f".{target.name}.partial"
        on_rank_0(partial_folder, partial(make_empty, partial_folder))
        small_files = {
            STATE_FILE: json.dumps(state, indent=1).encode(),
            SCHEDULE_FILE: json.dumps(_schedule(policy), indent=1).encode(),
            RANDOM_FILE: gather_random_states(),
        }
        with policy.optimizer_on_device():
            chunks, metadata = plan_writes(_chunks(policy))
            # Training changes the memory that the shards are views of.
            copies = [
                replace(chunk, content=partial(_same, _host_copy(chunk.content())))
                for chunk in chunks
            ]
        name = parallel.broadcast_object(f"checkpoint/{uuid.uuid4().hex}")
        exchange = FileExchange(parallel.store(), name, parallel.rank(), parallel.world_size())

        def write_own() -> WrittenFile:
            for name, content in (own_files or {}).items():
                (partial_folder / name).write_bytes(content)
            return write_chunks(copies, partial_folder)

        def write() -> None:
            files = exchange.of_all(write_own)
            if files is not None:
                write_description(partial_folder, metadata, files)
                for name, content in small_files.items():
                    (partial_folder / name).write_bytes(content)
                publish(
                    partial_folder, target, {file.name: file.checksum for file in files}, self._keep
                )
                logger.info("checkpoint: saved %s", target)

        self._pending = step, partial_folder, _in_background(write)
        return target

    def notice(self) -> None:
        """See whether the save under way is complete; costs one small exchange while there is one.

        Raises:
            CheckpointError: It cannot be written; complete checkpoints are as they were.
        """
        if self._pending is not None and all(parallel.gather_from_ranks(self._pending[2].done())):
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            CheckpointError: It cannot be written; complete checkpoints are as they were.
        """
        if self._pending is None:
            return
        (step, partial_folder, writing), self._pending = self._pending, None
        try:
            on_every_rank(partial_folder, writing.result)
        except CheckpointError:
            if parallel.rank() == 0:
                # Half a checkpoint is of no use and may be what fills the disk; what cannot be
                # removed now, the next save removes.
                shutil.rmtree(partial_folder, ignore_errors=True)
            raise
        self._on_complete(step)


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


def _chunks(policy: Policy) -> list[WriteChunk]:
    """Return what this rank could write of a checkpoint. Weights come first, which more than one
    rank has.
    """
    entries = save_entries(policy.model)
    weights = [shard for entry in entries.values() for shard in shards_of(entry)]
    found = optimizer_state.parameter_shards(policy.optimizer)
    states = optimizer_state.shards(entries, found)
    objects = [chunk for entry in entries.values() for chunk in object_chunks(entry)]
    return objects + [
        chunk
        for shard in weights + states
        for chunk in chunks_of(shard, partial(_same, shard.tensor))
    ]


def _schedule(policy: Policy) -> dict[str, Any]:
    updates = optimizer_state.num_updates(
        policy.optimizer, optimizer_state.parameter_shards(policy.optimizer)
    )
    return {
        "num_updates": max(parallel.gather_from_ranks(updates)),
        "scheduler": policy.scheduler.state_dict(),
    }


def _same(value: T) -> T:
    return value


def _host_copy(content: torch.Tensor | bytes) -> torch.Tensor | bytes:
    return content if isinstance(content, bytes) else content.detach().to("cpu", copy=True)


def _in_background(action: Callable[[], T]) -> Future[T]:
    """Start an action that ends with the process, be it done or not."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)  # whoever asks for the result gets it

    threading.Thread(target=run, name="checkpoint writer", daemon=True).start()
    return future


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

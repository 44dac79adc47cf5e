"""Writes the checkpoints of a run while training goes on.

The training thread copies what is to be saved to host memory and touches no file. Threads write the
copy, read it back from disk, and publish the checkpoint; with a staging folder the copy goes to a
disk of the machine first, and shared storage takes it from there.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.atomic_files import forget_cached
from zppo_mm.errors import CheckpointError
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import optimizer_state
from zppo_mm.training.checkpoint_files import (
    RANDOM_FILE,
    SCHEDULE_FILE,
    STATE_FILE,
    folder_of_step,
    make_empty,
    publish,
)
from zppo_mm.training.file_exchange import FileExchange
from zppo_mm.training.manifest import DamagedCheckpointError, Listed, check_file
from zppo_mm.training.policy import Policy
from zppo_mm.training.random_states import gather_random_states
from zppo_mm.training.staging import stage
from zppo_mm.weights.distributed_folder import (
    WrittenFile,
    on_every_rank,
    plan_writes,
    write_description,
)
from zppo_mm.weights.megatron_folder import save_entries
from zppo_mm.weights.tensor_shards import WriteChunk, chunks_of, object_chunks, shards_of

T = TypeVar("T")
WriteOwn = Callable[[Path], WrittenFile]
"""Writes this rank's file to a folder."""
logger = logging.getLogger(__name__)


def _raise(step: int, error: CheckpointError) -> None:
    raise error


@dataclass(frozen=True, slots=True)
class _Save:
    """A save under way.

    Attributes:
        step: Rollout steps done.
        folder: Unfinished.
        staged: Done when host memory no longer holds the copy, if there is a staging folder.
        complete: Done when all ranks' files are written, and on rank 0 when it is published.
    """

    step: int
    folder: Path
    staged: Future[WriteOwn]
    complete: Future[None]


class CheckpointWriter:
    """Writes the checkpoints of a run while training goes on. Every rank calls its methods
    together, from the thread that trains.

    A checkpoint is complete as soon as all ranks have written their files, whatever the training
    thread does then. A run that is to end calls `finish` last, wherever it was interrupted between
    two collectives.

    Args:
        folder: Holds the checkpoints of a run, on storage that all ranks share.
        keep: Complete checkpoints left after a save, at least 1.
        on_complete: Called with the step of every checkpoint that has become complete, by whatever
            finds it so.
        staging: A folder of each machine that takes the files first. Host memory then has the copy
            only until that disk has it, and a save waits for the second before it rather than for
            the one before, so that shared storage may stall for an interval between saves.
        on_failure: Called in its place, on every rank, with the error of a save that could not be
            written; complete checkpoints are as they were. Without it the error is raised.
        in_use: Returns a checkpoint that must not be removed for now; called on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        on_complete: Callable[[int], None] = lambda step: None,
        staging: Path | None = None,
        on_failure: Callable[[int, CheckpointError], None] = _raise,
        in_use: Callable[[], Path | None] = lambda: None,
    ) -> None:
        self._folder, self._keep, self._staging = folder, keep, staging
        self._on_complete, self._on_failure, self._in_use = on_complete, on_failure, in_use
        self._most_pending = 1 if staging is None else 2
        self._pending: deque[_Save] = deque()

    def save(
        self,
        step: int,
        policy: Policy,
        state: dict[str, Any],
        own_files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Copy what is to be saved, and begin to write it, when the saves before have left room.

        Args:
            step: Rollout steps done.
            policy: Weights, optimizer and schedule.
            state: Everything else that a resumed run needs, as JSON values, the same on every rank.
            own_files: Further files of this rank, by names that no other rank has.

        Returns:
            Where the checkpoint will be.

        Raises:
            CheckpointError: The ranks' shards do not make up whole tensors.
        """
        while len(self._pending) >= self._most_pending:
            self._finish_oldest()
        if self._pending:
            # One copy in host memory at a time. What failed there is an error of that save.
            wait([self._pending[-1].staged])
        target = folder_of_step(self._folder, step)
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
        partial_folder = self._folder / f".{target.name}.partial"
        before = [each.complete for each in self._pending]
        staged = _in_background(partial(stage, copies, self._staging))

        def write() -> None:
            wait(before)  # on storage they follow each other
            exchange.begin(partial(make_empty, partial_folder))
            try:
                files = exchange.of_all(lambda: _write_own(staged, own_files or {}, partial_folder))
                if files is not None:
                    write_description(partial_folder, metadata, files)
                    for name, content in small_files.items():
                        (partial_folder / name).write_bytes(content)
                    checksums = {file.name: file.checksum for file in files}
                    publish(partial_folder, target, checksums, self._keep, self._in_use)
                    logger.info("checkpoint: saved %s", target)
            except BaseException:
                if parallel.rank() == 0:
                    # Half a checkpoint is of no use and may be what fills the disk; what cannot be
                    # removed now, the next save removes.
                    shutil.rmtree(partial_folder, ignore_errors=True)
                raise

        self._pending.append(_Save(step, partial_folder, staged, _in_background(write)))
        return target

    def notice(self) -> None:
        """See whether the oldest save under way is complete; costs one small exchange while there
        is one.
        """
        if self._pending and all(parallel.gather_from_ranks(self._pending[0].complete.done())):
            self._finish_oldest()

    def finish(self) -> None:
        """Wait for all saves under way."""
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        oldest = self._pending.popleft()
        try:
            on_every_rank(oldest.folder, oldest.complete.result)
        except CheckpointError as error:
            self._on_failure(oldest.step, error)
        else:
            self._on_complete(oldest.step)


def _write_own(
    staged: Future[WriteOwn], own_files: Mapping[str, bytes], folder: Path
) -> WrittenFile:
    """Write this rank's files, and read its part of the tensors back from disk: older checkpoints
    are removed on the strength of this one.
    """
    for name, content in own_files.items():
        (folder / name).write_bytes(content)
    written = staged.result()(folder)
    forget_cached(folder / written.name)
    try:
        check_file(folder, written.name, Listed(written.size, written.checksum))
    except DamagedCheckpointError as error:
        raise CheckpointError(
            f"checkpoint: a file that was written reads differently, got {error}; check the disk"
        ) from error
    return written


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

"""One folder per save: weights, optimizer and schedule in Megatron's distributed format, and
everything else of the run beside them.

A checkpoint is written next to its place, while training goes on, and renamed when it is complete,
synced to disk and listed in a manifest. A process killed at any moment therefore leaves the
previous checkpoint as it was, and at most a hidden unfinished folder that the next save removes.
Each rank writes and reads about its own share, of which it holds one copy in host memory until it
is written.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data.atomic_files import replace_folder
from data.errors import DataError
from zppo_mm.errors import CheckpointError, ZppoError
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import optimizer_state
from zppo_mm.training.checkpoint_files import (
    make_empty,
    publish,
    put_back,
    step_folders,
)
from zppo_mm.training.file_exchange import FileExchange
from zppo_mm.training.manifest import DamagedCheckpointError, check_file, read_manifest
from zppo_mm.training.policy import Policy
from zppo_mm.training.random_states import (
    gather_random_states,
    read_random_states,
    restore_random_states,
)
from zppo_mm.weights.boxes import Box, Piece, boxes_of, object_pieces, pieces_of
from zppo_mm.weights.distributed_folder import (
    DistributedFolder,
    on_every_rank,
    on_rank_0,
    share_out,
    write_description,
    write_pieces,
)
from zppo_mm.weights.megatron_folder import save_entries

T = TypeVar("T")
logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
STATE_FILE = "state.json"
SCHEDULE_FILE = "schedule.json"
RANDOM_FILE = "random.pt"
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
        on_complete: Told the step of every checkpoint that has become complete, by `notice` or
            `finish`.
    """

    def __init__(
        self, folder: Path, keep: int, on_complete: Callable[[int], None] = lambda step: None
    ) -> None:
        self._folder, self._keep, self._on_complete = folder, keep, on_complete
        self._pending: tuple[int, Path, Future[None]] | None = None

    def save(self, step: int, policy: Policy, state: dict[str, Any]) -> Path:
        """Finish the save before, copy what is to be saved, and begin to write it.

        Args:
            step: Rollout steps done.
            policy: Weights, optimizer and schedule.
            state: Everything else that a resumed run needs, as JSON values, the same on every rank.

        Returns:
            Where the checkpoint will be.

        Raises:
            CheckpointError: This save or the one before cannot be written; complete checkpoints are
                as they were.
        """
        self.finish()
        target = self._folder / f"step_{step:06d}"
        partial_folder = self._folder / f".{target.name}.partial"
        on_rank_0(partial_folder, partial(make_empty, partial_folder))
        small_files = {
            STATE_FILE: json.dumps(state, indent=1).encode(),
            SCHEDULE_FILE: json.dumps(_schedule(policy), indent=1).encode(),
            RANDOM_FILE: gather_random_states(),
        }
        pieces, metadata = share_out(_pieces(policy))
        # Training changes what they look at.
        copies = [
            replace(piece, content=partial(_same, _host_copy(piece.content()))) for piece in pieces
        ]
        name = parallel.broadcast_object(f"checkpoint/{uuid.uuid4().hex}")
        exchange = FileExchange(parallel.store(), name, parallel.rank(), parallel.world_size())

        def write() -> None:
            files = exchange.of_all(lambda: write_pieces(copies, partial_folder))
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
        check: Told the `state` before anything is overwritten; raises on every rank if it is not to
            be loaded.

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
            "remove the run's folder to start again"
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
    schedule, random_states, state = on_every_rank(path, partial(_read_small_files, path))
    with taking_up(path):
        check(state)
    entries = save_entries(policy.model)
    found = optimizer_state.shares(policy.optimizer)
    weights = [box for entry in entries.values() for box in boxes_of(entry)]
    states = optimizer_state.boxes(entries, found, only_main=False)
    wanted = set().union(*parallel.gather_from_ranks({box.key for box in weights + states}))
    with torch.no_grad():
        readers = _readers(weights)
        on_every_rank(
            path, partial(_read_tensors, path, wanted, [*_own(weights, readers), *states])
        )
        _hand_round(weights, readers)
    with taking_up(path):
        optimizer_state.set_num_updates(policy.optimizer, found, schedule["num_updates"])
        policy.scheduler.load_state_dict(schedule["scheduler"])
        restore_random_states(random_states)
    return state


@contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """Inside the block what stands in a checkpoint's small files is taken up; no collective is
    called there.

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
        told = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path}: cannot be used, got {told}, expected what a run of this version saves; "
            f"{_NEW_RUN}"
        ) from error


def verify(path: Path) -> None:
    """Compare every file with the manifest, each rank its share. Every rank calls it.

    Raises:
        DamagedCheckpointError: On every rank, naming the first file that is missing or damaged.
        CheckpointError: On every rank, if a file cannot be read now, which says nothing about the
            checkpoint.
    """
    on_every_rank(path, lambda: _verify_share(path))


def _pieces(policy: Policy) -> list[Piece]:
    """Return what this rank could write of a checkpoint. Weights come first, which more than one
    rank has.
    """
    entries = save_entries(policy.model)
    weights = [box for entry in entries.values() for box in boxes_of(entry)]
    found = optimizer_state.shares(policy.optimizer)
    states = optimizer_state.boxes(entries, found, only_main=True)
    objects = [piece for entry in entries.values() for piece in object_pieces(entry)]
    return objects + [
        piece for box in weights + states for piece in pieces_of(box, partial(_same, box.tensor))
    ]


def _schedule(policy: Policy) -> dict[str, Any]:
    updates = optimizer_state.num_updates(
        policy.optimizer, optimizer_state.shares(policy.optimizer)
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


def _read_small_files(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return schedule, random states and the run's own state."""
    found: list[Any] = []
    for name, parse in (
        (SCHEDULE_FILE, json.loads),
        (RANDOM_FILE, read_random_states),
        (STATE_FILE, json.loads),
    ):
        try:
            found.append(parse((path / name).read_bytes()))
        except FileNotFoundError as error:
            # It is not in the manifest either, with which the files have been compared.
            raise CheckpointError(
                f"{path}: saved by another version of this program, got no {name}, expected one; "
                "go on with the version that saved it, or export it and start a run of another "
                "name from that"
            ) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path / name}: cannot be used, got {error}, expected what a run of this version "
                "saves; use another checkpoint"
            ) from error
    schedule, random_states, state = found
    if (
        not isinstance(schedule, dict)
        or not isinstance(state, dict)
        or type(schedule.get("num_updates")) is not int
    ):
        raise CheckpointError(
            f"{path}: {SCHEDULE_FILE} or {STATE_FILE} is no object of a run's checkpoint; use "
            "another checkpoint"
        )
    return schedule, random_states, state


def _read_tensors(path: Path, wanted: set[str], boxes: list[Box]) -> None:
    """Fill boxes from a checkpoint that holds the wanted tensors of all ranks and no other."""
    folder = DistributedFolder(path)
    if surplus := sorted(folder.tensor_keys - wanted):
        raise CheckpointError(
            f"{path}: the checkpoint does not fit, got {len(surplus)} tensors of no use "
            f"({surplus[0]}), expected the weights and the optimizer of this model; resume with "
            "the model, model.params_dtype, train.freeze and lora that it was saved with"
        )
    folder.read(boxes)


def _replicas() -> Any:
    """Return the group of ranks that hold the same weights as this one."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _readers(weights: list[Box]) -> list[int]:
    """Say of each box which of the ranks that have it reads it, so that each reads about as
    much.
    """
    loads = [0] * dist.get_world_size(_replicas())
    readers = []
    for box in weights:
        readers.append(loads.index(min(loads)))
        loads[readers[-1]] += box.tensor.nbytes
    return readers


def _own(weights: list[Box], readers: list[int]) -> list[Box]:
    mine = dist.get_rank(_replicas())
    return [box for box, reader in zip(weights, readers, strict=True) if reader == mine]


def _hand_round(weights: list[Box], readers: list[int]) -> None:
    """Send what each rank has read to the others that hold the same weights."""
    group = _replicas()
    ranks = dist.get_process_group_ranks(group)
    for box, reader in zip(weights, readers, strict=True):
        # As bytes: not every backend knows every type.
        dist.broadcast(box.tensor.view(-1).view(torch.uint8), src=ranks[reader], group=group)


def _verify_share(path: Path) -> None:
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

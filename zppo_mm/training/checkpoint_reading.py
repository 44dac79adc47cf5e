"""What each rank reads of a checkpoint: the small files, and its part of the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from zppo_mm.errors import CheckpointError
from zppo_mm.training.checkpoint_files import RANDOM_FILE, SCHEDULE_FILE, STATE_FILE
from zppo_mm.training.random_states import read_random_states
from zppo_mm.weights.distributed_folder import DistributedFolder
from zppo_mm.weights.tensor_shards import TensorShard


def read_small_files(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
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


def read_tensors(path: Path, wanted: set[str], shards: list[TensorShard]) -> None:
    """Fill shards from a checkpoint that holds the wanted tensors of all ranks and no other."""
    folder = DistributedFolder(path)
    if surplus := sorted(folder.tensor_keys - wanted):
        raise CheckpointError(
            f"{path}: the checkpoint does not fit, got {len(surplus)} tensors of no use "
            f"({surplus[0]}), expected the weights and the optimizer of this model; resume with "
            "the model, model.params_dtype, train.freeze and lora that it was saved with"
        )
    folder.read(shards)


def _replicas() -> Any:
    """Return the group of ranks that hold the same weights as this one."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def choose_readers(weights: list[TensorShard]) -> list[int]:
    """Say of each shard which of the ranks that have it reads it, so that each reads about as
    much.
    """
    loads = [0] * dist.get_world_size(_replicas())
    readers = []
    for shard in weights:
        readers.append(loads.index(min(loads)))
        loads[readers[-1]] += shard.tensor.nbytes
    return readers


def shards_to_read(weights: list[TensorShard], readers: list[int]) -> list[TensorShard]:
    mine = dist.get_rank(_replicas())
    return [shard for shard, reader in zip(weights, readers, strict=True) if reader == mine]


def broadcast_shards(weights: list[TensorShard], readers: list[int]) -> None:
    """Send what each rank has read to the others that hold the same weights."""
    group = _replicas()
    ranks = dist.get_process_group_ranks(group)
    for shard, reader in zip(weights, readers, strict=True):
        # As bytes: not every backend knows every type.
        dist.broadcast(shard.tensor.view(-1).view(torch.uint8), src=ranks[reader], group=group)

"""The parallel layout of a run: set-up on NCCL or gloo, ranks and sizes, and the few exchanges of
Python objects.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

# Here, because its functions would otherwise hold the default process group, if there is one when
# they are made, and with it gloo's threads.
import torch.distributed.nn
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import megatron_cpu
from zppo_mm.parallel.failures import RankZeroError, translate_rendezvous_errors
from zppo_mm.parallel.gloo_device import release_gloo_device, share_gloo_device
from zppo_mm.parallel.job_store import join_job
from zppo_mm.parallel.layout import validate_layout

if TYPE_CHECKING:
    from zppo_mm.parallel.partition import JobPartition

T = TypeVar("T")
_WAIT_SECONDS = 0.02
"""Time between two broadcasts of rank 0 while it works and the others wait."""


def initialize(config: ParallelConfig, seed: int, partition: JobPartition | None = None) -> None:
    """Join the process group and set up Megatron's groups and random streams.

    Works under torchrun (its environment is read) and, without any launcher, as a single process.
    Called again, it changes the layout of the same processes.

    Args:
        config: The layout; what is left of the world size is data parallel.
        seed: Seeds weight initialisation and dropout, the same on every rank.
        partition: The part of a divided job whose processes join here; `None` takes all
            processes.

    Raises:
        ConfigError: The number of processes does not fit the layout.
    """
    megatron_cpu.install()
    # cuDNN would compute convolutions in float32 with 10 bits of mantissa, unlike all other
    # products of float32.
    torch.backends.cudnn.allow_tf32 = False
    if dist.is_initialized():
        validate_layout(config, dist.get_world_size())
        _leave_groups()
    else:
        validate_layout(
            config,
            partition.size if partition is not None else int(os.environ.get("WORLD_SIZE", "1")),
        )
        with translate_rendezvous_errors():
            _join(timedelta(minutes=config.timeout_minutes), partition)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _leave_groups() -> None:
    """Give up Megatron's groups of the layout so far. Megatron only forgets most of them, and a
    forgotten gloo group keeps its threads.
    """
    groups = {
        id(group): group
        for group in parallel_state._global_process_group_list or ()
        if isinstance(group, dist.ProcessGroup)
    }
    dist.barrier()
    for group in groups.values():
        dist.destroy_process_group(group)
    _forget_groups()


def _forget_groups() -> None:
    """Have Megatron forget its groups, those that its own function leaves in place too."""
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


def _join(timeout: timedelta, partition: JobPartition | None) -> None:
    """Join this partition's processes, or those that torchrun's environment names, or be alone."""
    share_gloo_device()
    join = partial(dist.init_process_group, "gloo", timeout=timeout)
    if torch.cuda.is_available():
        # Otherwise NCCL guesses this rank's GPU from the global rank, which differs from the local
        # one on several nodes and in a partition.
        gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(gpu)
        join = partial(dist.init_process_group, "nccl", timeout=timeout, device_id=gpu)
    if partition is not None:
        store = PrefixStore(partition.name, partition.store)
        join(store=store, rank=partition.rank, world_size=partition.size)
    elif "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        job_store, rank, size = join_job(timeout)
        join(store=job_store, rank=rank, world_size=size)
    else:
        join(store=HashStore(), rank=0, world_size=1)


def shutdown() -> None:
    """Leave the process group after every rank has arrived; does nothing if there is none."""
    if dist.is_initialized():
        dist.barrier()
        leave()


def leave() -> None:
    """Leave the process group, be the other ranks done or not; does nothing if there is none.

    Gloo's threads end with their groups. One of them that still frees a tensor while the
    interpreter ends would abort the process.
    """
    if dist.is_initialized():
        _forget_groups()
        dist.destroy_process_group()
        release_gloo_device()


def device() -> torch.device:
    """Return where this rank's tensors live."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def tensor_rank() -> int:
    """Return this rank's index among the tensor-parallel ranks of its layers."""
    return int(parallel_state.get_tensor_model_parallel_rank())


def tensor_size() -> int:
    """Return the tensor-parallel size."""
    return int(parallel_state.get_tensor_model_parallel_world_size())


def tensor_group() -> dist.ProcessGroup:
    """Return this rank's tensor-parallel group."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def pipeline_rank() -> int:
    """Return this rank's pipeline stage."""
    return int(parallel_state.get_pipeline_model_parallel_rank())


def pipeline_size() -> int:
    """Return the number of pipeline stages."""
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def pipeline_group() -> dist.ProcessGroup:
    """Return the stages of this rank's pipeline."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def context_rank() -> int:
    """Return which part of its packs this rank has in training."""
    return int(parallel_state.get_context_parallel_rank())


def context_size() -> int:
    """Return how many ranks share the tokens of every pack in training."""
    return int(parallel_state.get_context_parallel_world_size())


def context_group() -> dist.ProcessGroup:
    """Return the ranks that share this rank's packs in training, in the order of their parts."""
    return cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())


def data_rank() -> int:
    """Return this rank's data-parallel rank, by which the micro-batches of an update are divided;
    context ranks have the same.
    """
    return int(parallel_state.get_data_parallel_rank())


def data_size() -> int:
    """Return the data-parallel size, without context ranks."""
    return int(parallel_state.get_data_parallel_world_size())


def replica_rank() -> int:
    """Return which replica of the model this rank belongs to: every context rank has all weights of
    its stage, so it counts.
    """
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def num_replicas() -> int:
    """Return the number of replicas of the model: data x context ranks."""
    return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def model_group() -> dist.ProcessGroup:
    """Return the ranks of this replica: all its tensor-parallel ranks on all its stages."""
    return cast(dist.ProcessGroup, parallel_state.get_model_parallel_group())


def is_first_stage() -> bool:
    """Return whether this rank embeds tokens and media."""
    return pipeline_rank() == 0


def is_last_stage() -> bool:
    """Return whether this rank computes logits and the loss."""
    return pipeline_rank() == pipeline_size() - 1


def is_replica_leader() -> bool:
    """Return whether this rank is the leader of its replica: tensor rank 0 of the last stage."""
    return is_last_stage() and tensor_rank() == 0


def gather_from_replicas(local: Sequence[T]) -> list[list[T]]:
    """Exchange what every replica has; all ranks call it and all get everything.

    Args:
        local: This replica's objects. Only its leader's count, so the other ranks of the replica
            may pass an empty list.

    Returns:
        One list per replica, in their order.
    """
    return gather_with_flag(local, flag=False)[0]


def gather_with_flag(local: Sequence[T], flag: bool) -> tuple[list[list[T]], bool]:
    """Exchange what every replica has, and whether a flag is up on any rank; all ranks call it and
    all get the same.

    Leaders exchange with leaders, then each gives its replica the result: an exchange pads every
    rank's object to the longest, which over all ranks would be room for one per rank on each.
    """
    group = model_group()
    leader = leader_of_replica()
    flags = _gather_in(group, flag)
    result: list[Any] = [None]
    if rank() == leader:
        leaders = parallel_state.get_data_parallel_group(with_context_parallel=True)
        result = [_gather_in(leaders, (list(local), any(flags)))]
    if group.size() > 1:
        dist.broadcast_object_list(result, src=leader, group=group)
    return [objects for objects, _ in result[0]], any(is_up for _, is_up in result[0])


def leader_of_replica() -> int:
    """Return the rank of this replica's leader: a replica's ranks count tensor ranks first, then
    stages.
    """
    return int(dist.get_process_group_ranks(model_group())[-tensor_size()])


def _gather_in(group: dist.ProcessGroup, local: T) -> list[T]:
    if group.size() == 1:
        return [local]
    collected: list[Any] = [None] * group.size()
    dist.all_gather_object(collected, local, group=group)
    return collected


def gather_from_ranks(local: T) -> list[T]:
    """Return every rank's object on every rank, by rank."""
    collected: list[Any] = [None] * world_size()
    dist.all_gather_object(collected, local)
    return collected


def broadcast_object(value: T | None, source: int = 0) -> T:
    """Return rank `source`'s value on every rank; the others' argument is ignored."""
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return cast(T, values[0])


def on_rank_zero(work: Callable[[], T]) -> T:
    """Return what rank 0 made, on every rank.

    The work can take longer than a collective waits. So it runs in a thread, while rank 0 keeps
    broadcasting that it is not done.

    Args:
        work: What rank 0 alone does; it calls no collective.

    Raises:
        RankZeroError: On the other ranks, when the work failed on rank 0, which raises its own
            error.
    """
    if world_size() == 1:
        return work()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work) if rank() == 0 else None
        while not broadcast_object(future is None or future.done()):
            time.sleep(_WAIT_SECONDS)
        error = future.exception() if future is not None else None
        problem = broadcast_object(repr(error) if error is not None else "")
        if error is not None:
            raise error
        if problem:
            raise RankZeroError(
                f"parallel: rank 0 could not do its work for all ranks, got {problem}; see its own "
                "message"
            )
        return broadcast_object(future.result() if future is not None else None)


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Return what every rank made, by rank; ranks may take longer than a collective waits, one much
    longer than another.

    Args:
        work: Calls no collective and does not raise.
    """
    if world_size() == 1:
        return [work()]
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        while not all(gather_from_ranks(future.done())):
            time.sleep(_WAIT_SECONDS)
        return gather_from_ranks(future.result())


def any_rank(flag: bool) -> bool:
    """Return whether a flag is up on any rank; every rank calls it."""
    return any(gather_from_ranks(flag))


def store() -> Store:
    """Return the key-value store of this partition; process groups must be initialised."""
    return dist.distributed_c10d._get_default_store()


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Add up a tensor over all ranks, in place."""
    dist.all_reduce(tensor)


def barrier() -> None:
    """Wait until every rank has arrived; returns at once without a process group."""
    if dist.is_initialized():
        dist.barrier()

"""Process set-up, object exchange and the loss of a rank, on gloo."""

from __future__ import annotations

import importlib
import os
import pickle
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.support.launch import run_ranks
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel import failures
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.layout import validate_layout


def describe(layouts: list[ParallelConfig]) -> list[dict[str, object]]:
    described = []
    for layout in layouts:
        parallel.initialize(layout, seed=7)
        described.append(
            {
                "data": parallel.data_rank(),
                "tensor": parallel.tensor_rank(),
                "pipeline": parallel.pipeline_rank(),
                "leader": parallel.is_replica_leader(),
                "gathered": parallel.gather_from_replicas([f"from {parallel.rank()}"]),
                "broadcast": parallel.broadcast_object({"rank": parallel.rank()}, source=2),
                "random": torch.rand(1).item(),
            }
        )
    parallel.shutdown()
    return described


def lose_a_rank() -> None:
    parallel.initialize(ParallelConfig(timeout_minutes=1.0), seed=0)
    if parallel.rank() == 1:
        os._exit(3)
    with failures.translate_collective_errors():
        dist.all_reduce(torch.ones(1))


def fail() -> None:
    raise OSError("disk gone")


def work_long() -> int:
    time.sleep(6)
    return parallel.rank()


def let_rank_zero_work() -> list[object]:
    parallel.initialize(ParallelConfig(), seed=0)
    dist.distributed_c10d._set_pg_timeout(
        timedelta(seconds=3), dist.group.WORLD
    )  # less than the work takes
    made: list[object] = [parallel.on_rank_zero(work_long)]
    try:
        parallel.on_rank_zero(fail)
    except (OSError, failures.RankZeroError) as error:
        made.append(f"{type(error).__name__}: {error}")
    parallel.shutdown()
    return made


def test_the_others_wait_for_rank_zero_longer_than_a_collective_and_end_with_it() -> None:
    message = (
        "parallel: rank 0 could not do its work for all ranks, got OSError('disk gone'); see its "
        "own message"
    )
    assert run_ranks(let_rank_zero_work, 2) == [
        [0, "OSError: disk gone"],
        [0, f"RankZeroError: {message}"],
    ]


def test_ranks_and_exchanges_in_two_layouts_of_the_same_processes() -> None:
    layouts = [
        ParallelConfig(tensor_model_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2),
    ]
    ranks = run_ranks(describe, 4, layouts)
    tensor, pipeline = ([described[index] for described in ranks] for index in (0, 1))
    assert [(rank["data"], rank["tensor"]) for rank in tensor] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [rank["gathered"] for rank in tensor] == [[["from 0"], ["from 2"]]] * 4
    # The leader of a pipeline is on its last stage.
    assert {index: rank["data"] for index, rank in enumerate(pipeline) if rank["leader"]} == {
        2: 0,
        3: 1,
    }
    assert [rank["gathered"] for rank in pipeline] == [[["from 2"], ["from 3"]]] * 4
    for described in (tensor, pipeline):
        assert all(rank["broadcast"] == {"rank": 2} for rank in described)
        assert len({rank["random"] for rank in described}) == 1


def test_a_lost_rank_ends_the_others_with_a_message() -> None:
    (code, output), (lost, _) = run_ranks(lose_a_rank, 2, check=False, timeout_seconds=200.0)
    assert lost == 3
    assert code == 1, output
    assert "parallel: rank 0 lost another process of the run" in output


@pytest.mark.parametrize(
    ("tensor", "pipeline", "processes", "suggestion"),
    [(2, 1, 3, (1, 1)), (2, 2, 2, (2, 1)), (4, 2, 6, (3, 2))],
)
def test_a_layout_that_does_not_fit_names_one_that_does(
    tensor: int, pipeline: int, processes: int, suggestion: tuple[int, int]
) -> None:
    config = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    message = (
        rf"nearest layout .*tensor_model_parallel_size={suggestion[0]} "
        rf"parallel.pipeline_model_parallel_size={suggestion[1]}$"
    )
    with pytest.raises(ConfigError, match=message):
        validate_layout(config, processes)


def test_a_context_size_that_does_not_fit_is_named_too() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    message = (
        r"tensor 2 x pipeline 1 x context 2, got a world size of 6, expected a multiple of 4; "
        r".*parallel.context_parallel_size=1$"
    )
    with pytest.raises(ConfigError, match=message):
        validate_layout(config, 6)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="sizes must be at least 1"):
        validate_layout(ParallelConfig(tensor_model_parallel_size=0), 1)


def alone() -> tuple[int, list[list[int]]]:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        del os.environ[name]
    parallel.initialize(ParallelConfig(), seed=0)
    gathered = parallel.gather_from_replicas([1, 2])
    size = parallel.data_size()
    threads = num_threads()
    parallel.initialize(ParallelConfig(), seed=0)
    # The groups of the layout before are given up with all that they hold.
    assert num_threads() <= threads
    parallel.shutdown()
    return size, gathered


def num_threads() -> int:
    """Return the threads of this process, those that Python does not know included."""
    return len(os.listdir("/proc/self/task"))


def padded_bytes(layout: ParallelConfig, size: int) -> int:
    """Return for how many bytes this rank makes room while replicas exchange objects of a size."""
    parallel.initialize(layout, seed=0)
    rooms = []
    exchange = dist.all_gather_object

    def counting(collected: list[object], value: object, group: dist.ProcessGroup) -> None:
        rooms.append(len(collected) * len(pickle.dumps(value)))
        exchange(collected, value, group=group)

    with mock.patch.object(dist, "all_gather_object", counting):
        own = [bytes([parallel.replica_rank()]) * size] if parallel.is_replica_leader() else []
        gathered = parallel.gather_from_replicas(own)
    assert [part[0][0] for part in gathered] == list(range(parallel.num_replicas()))
    parallel.shutdown()
    return sum(rooms)


def test_only_leaders_make_room_for_what_replicas_exchange() -> None:
    size = 100_000
    rooms = run_ranks(padded_bytes, 4, ParallelConfig(tensor_model_parallel_size=2), size)
    # Leaders are ranks 0 and 2; each of the 2 objects counts once. The rest is flags.
    assert [round(each / size) for each in rooms] == [2, 0, 2, 0]


def test_one_process_needs_no_launcher() -> None:
    assert run_ranks(alone, 1) == [(1, [[1, 2]])]


def gloo_threads() -> list[str]:
    """Return the names of the threads of this process that belong to gloo's groups."""
    names = [
        Path(f"/proc/self/task/{thread}/comm").read_text().strip()
        for thread in os.listdir("/proc/self/task")
    ]
    return [name for name in names if "gloo" in name]


def see_gloo_threads() -> tuple[list[str], list[str]]:
    parallel.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    # Imported by transformers' networks among others; made now, its functions' defaults would hold
    # the default process group.
    importlib.import_module("torch.distributed.nn")
    before = gloo_threads()
    parallel.shutdown()
    return before, gloo_threads()


def test_threads_end_with_their_groups() -> None:
    # One that still freed a tensor while the interpreter ended would abort the process.
    for before, after in run_ranks(see_gloo_threads, 2):
        # Each thread of this name wakes a hundred times a second.
        assert before.count("gloo_tcp_loop") == 1
        assert after == []

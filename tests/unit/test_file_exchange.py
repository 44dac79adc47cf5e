"""The exchange between the threads that write a checkpoint: none waits forever for one that has
failed, and rank 0 does not go on while another rank writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from zppo_mm.errors import CheckpointError
from zppo_mm.training.file_exchange import FileExchange
from zppo_mm.weights.distributed_folder import WrittenFile

PATIENCE_SECONDS = 60.0


def exchanges() -> list[FileExchange]:
    store = HashStore()
    return [FileExchange(store, "save", rank, 2) for rank in (0, 1)]


def fail() -> None:
    raise OSError("no room")


def written(name: str) -> WrittenFile:
    return WrittenFile(name, 1, 2, [])


def test_a_folder_that_cannot_be_made_fails_on_every_rank() -> None:
    first, second = exchanges()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.begin, fail)
        with pytest.raises(OSError, match="no room"):
            first.begin(fail)
        with pytest.raises(CheckpointError, match="could not write its file, got OSError: no room"):
            waiting.result(PATIENCE_SECONDS)


def test_rank_0_has_every_file_or_an_error_when_all_have_written() -> None:
    first, second = exchanges()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.of_all, lambda: written("a"))
        assert second.of_all(lambda: written("b")) is None
        assert waiting.result(PATIENCE_SECONDS) == [written("a"), written("b")]


@pytest.mark.parametrize("failing", [0, 1])
def test_rank_0_waits_for_a_rank_that_still_writes(failing: int) -> None:
    store, tried, may_end = HashStore(), threading.Event(), threading.Event()
    ranks = [FileExchange(store, "save", rank, 2) for rank in (0, 1)]

    def write(rank: int) -> Callable[[], WrittenFile]:
        def act() -> WrittenFile:
            if rank == 1:
                assert may_end.wait(PATIENCE_SECONDS)
            else:
                tried.set()
            if rank == failing:
                fail()
            return written("file")

        return act

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(each.of_all, write(rank)) for rank, each in enumerate(ranks)]
        assert tried.wait(PATIENCE_SECONDS)
        # Rank 0 has done its part and asks for the other's at least again.
        with pytest.raises(TimeoutError):
            futures[0].result(0.2)
        may_end.set()
        errors = [future.exception(PATIENCE_SECONDS) for future in futures]
    assert isinstance(errors[0], OSError if failing == 0 else CheckpointError)
    assert "no room" in str(errors[0])
    assert (errors[1] is not None) == (failing == 1)

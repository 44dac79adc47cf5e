"""Processes that are started again agree on a new part of a store that outlived them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError, HashStore

from zppo_mm.parallel.job_store import agree_on_start

LIMIT = timedelta(seconds=60)


def start(store: HashStore, size: int) -> set[str]:
    """Start processes together, rank 0 last; returns the names that they agree on."""
    with ThreadPoolExecutor(max_workers=size) as pool:
        names = [
            pool.submit(agree_on_start, store, rank, size, LIMIT) for rank in reversed(range(size))
        ]
        return {each.result() for each in names}


def test_every_start_has_a_name_of_its_own_whatever_its_size() -> None:
    store = HashStore()
    names = [start(store, size) for size in (3, 3, 1, 2, 4)]
    assert [len(each) for each in names] == [1] * 5
    assert len(set.union(*names)) == 5


def test_what_a_start_left_behind_that_failed_is_no_part_of_the_next() -> None:
    store = HashStore()
    # A process that called and was killed, one that was killed within its call.
    store.set(f"start/calls/{store.add('start/calls', 1)}", "start/answer/dead")
    store.add("start/calls", 1)
    (name,) = start(store, 2)
    assert store.get("start/answer/dead").decode() == name
    assert len(start(store, 3)) == 1


def test_a_process_that_does_not_come_is_missed() -> None:
    with pytest.raises(DistStoreError, match="only 1 of 2 processes came"):
        agree_on_start(HashStore(), 0, 2, timedelta(seconds=0.1))

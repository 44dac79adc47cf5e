"""The key-value store of a job's processes, new at every start of them."""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]
    DistStoreError,
    PrefixStore,
    Store,
    rendezvous,
)

from zppo_mm.parallel.failures import translate_rendezvous_errors

_PAUSE_SECONDS = 0.02
_CALLS = "start/calls"


def join_job(timeout: timedelta) -> tuple[Store, int, int]:
    """Join the processes that torchrun's environment names; returns their store, this process's
    rank and their number.

    Raises:
        ConfigError: The job's address cannot be used, or some process did not come in time.
    """
    with translate_rendezvous_errors():
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
            store = PrefixStore(agree_on_start(store, rank, size, timeout), store)
    return store, rank, size


def agree_on_start(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that the processes of this start of a job have in common, and those of earlier
    starts have not.

    torchrun's store outlives the processes that it starts again, and what they left in it (the
    addresses of dead processes, a request to end the run) would be taken for news. Nothing in the
    environment differs from one start to the next: each node counts only its own restarts.

    So every process calls with a number of its own, rank 0 answers each call with the name, and
    goes on when all have answered under that name. It may answer dead processes too.

    Raises:
        DistStoreError: A process did not come in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank > 0:
        call = f"start/answer/{secrets.token_hex(8)}"
        store.set(f"{_CALLS}/{store.add(_CALLS, 1)}", call)
        store.wait([call], timeout)
        name = store.get(call).decode()
        store.add(f"{name}/arrived", 1)
        return name
    name = f"start/{secrets.token_hex(8)}"
    answered = 0
    waiting: set[str] = set()
    while (arrived := store.add(f"{name}/arrived", 0)) < size - 1:
        if time.monotonic() > deadline:
            raise DistStoreError(f"only {arrived + 1} of {size} processes came")
        num_calls = store.add(_CALLS, 0)
        waiting |= {f"{_CALLS}/{number}" for number in range(answered + 1, num_calls + 1)}
        answered = num_calls
        # A process may be, or have been ended, between its two calls.
        for key in [each for each in waiting if store.check([each])]:
            store.set(store.get(key).decode(), name)
            waiting.remove(key)
        time.sleep(_PAUSE_SECONDS)
    return name

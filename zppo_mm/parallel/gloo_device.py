"""One gloo device for all process groups of a process.

torch makes one per group, each with a thread that wakes a hundred times a second. Megatron makes
some twenty groups per rank, and a group that anything still refers to keeps its thread: 40 idle
groups take 2.5 % of a core.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d


class GlooOnSharedDevice(ProcessGroupGloo):
    """A gloo process group as torch makes it, on the process's one device."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta | None = None) -> None:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [_device()]
        if timeout is not None:
            options._timeout = timeout
        super().__init__(store, rank, size, options)


def share_gloo_device() -> None:
    """Have torch make all further gloo groups on one device."""
    distributed_c10d.ProcessGroupGloo = GlooOnSharedDevice  # type: ignore[misc]


def release_gloo_device() -> None:
    """Let the device's thread end with the groups that are on it."""
    _device.cache_clear()


@cache
def _device() -> Any:
    return ProcessGroupGloo.create_default_device()

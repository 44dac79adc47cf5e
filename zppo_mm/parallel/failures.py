"""Errors and signals for the failure of another process of the run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

import torch.distributed as dist

from zppo_mm.errors import ConfigError, ZppoError

RANK_FAILURE_EXIT_CODE = 71
"""EX_OSERR of sysexits.h: of a process that lost another one of the run, unlike one whose own error
would come again.
"""
_PR_SET_PDEATHSIG = 1
# How gloo, NCCL and the store word a connection that is gone, in lower case.
_CONNECTION_ERRORS = (
    "connection closed",
    "connection reset",
    "timed out",
    "timeout",
    "broken pipe",
    "recvvalue failed",
    "aborted",
)


class RankFailureError(ZppoError, RuntimeError):
    """Another process of the run died or stopped answering."""


class RankZeroError(ZppoError):
    """What rank 0 did for all ranks failed there."""


def end_with_launcher() -> None:
    """Have the system end this process when the one that started it dies.

    A killed torchrun leaves its workers running; they would go on writing beside the run that is
    started in their place. Linux only; elsewhere nothing happens.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the request was in place
        os.kill(os.getpid(), signal.SIGKILL)


def refuse_restarts(max_hours: float) -> None:
    """Refuse a limit of hours under a launcher that starts a run again whatever it ended for.

    Raises:
        ConfigError: There is a limit, and torchrun has `--max-restarts`.
    """
    num_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if max_hours and num_restarts:
        raise ConfigError(
            f"train.max_hours: torchrun would start the run again when its hours are over, got "
            f"{max_hours:g} and --max-restarts {num_restarts}, expected one of them; leave one out,"
            " and have torchrun itself ended with SIGTERM when the time is over"
        )


@contextlib.contextmanager
def translate_rendezvous_errors() -> Iterator[None]:
    """Turn the errors of a failed rendezvous into one line.

    Raises:
        ConfigError: The job's address cannot be used in the block.
    """
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"parallel: the job's processes cannot connect at {address}, got "
            f"{str(error).splitlines()[0]!r}, expected a free port on the first node that all can "
            "reach; give another one (torchrun --master-port)"
        ) from error


@contextlib.contextmanager
def translate_collective_errors() -> Iterator[None]:
    """Turn the backend's error about a broken connection into one that names the cause.

    Raises:
        RankFailureError: A collective in the block failed because another rank died or is silent.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ZppoError) or not any(
            words in str(error).lower() for words in _CONNECTION_ERRORS
        ):
            raise
        raise RankFailureError(
            f"parallel: rank {_rank()} lost another process of the run, got {error}, expected "
            "every rank to answer within parallel.timeout_minutes; look at the other ranks' output "
            "for the first error, then start the run again to resume"
        ) from error


def _rank() -> int:
    # Not of `groups`, which imports this module.
    return dist.get_rank() if dist.is_initialized() else 0

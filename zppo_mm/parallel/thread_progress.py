"""Whether a thread goes on, seen from another one."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType

COMPUTING_SECONDS = 0.001
"""Processor time between two checks of a thread that does more than wait."""
BOUNDED_MODULES = (
    "torch.distributed.distributed_c10d",
    # Waits for what it has sent and asked for by itself.
    "megatron.core.pipeline_parallel.p2p_communication",
)
"""Modules of collectives, which wait for other ranks with the limit of their process group."""


class ThreadProgress:
    """What a running thread has done since it was checked last.

    Args:
        thread: The one that others check.
        bounded_waits: Functions that wait with a limit of their own, like collectives.
        is_computing_progress: Whether using the processor is progress at one place in the program.

    Attributes:
        where: The innermost place in the program at the last check.
    """

    def __init__(
        self,
        thread: threading.Thread,
        bounded_waits: Iterable[Callable[..., object]] = (),
        *,
        is_computing_progress: bool = True,
    ) -> None:
        assert thread.ident is not None
        self.where = ""
        self._thread = thread.ident
        self._bounded = {_code_of(each) for each in bounded_waits}
        self._is_computing_progress = is_computing_progress
        self._clock = time.pthread_getcpuclockid(thread.ident)
        self._transfers = Path(f"/proc/self/task/{thread.native_id}/io")
        self._last_instruction = -1
        self._computed = 0.0
        self._transferred = 0

    def has_moved(self) -> bool:
        """Return whether the thread has gone on since the last check, or may wait where it is."""
        frame = sys._current_frames()[self._thread]
        self.where = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        # A mark keeps a call apart from the next one of the same function, whose frame may have the
        # same address; a reference would keep what the frame holds. Only debuggers read this one.
        is_same_call = not frame.f_trace_lines
        if frame.f_trace is None:
            frame.f_trace_lines = False
        instruction, computed, transferred = frame.f_lasti, self._cpu_seconds(), self._num_bytes()
        has_moved = (
            not is_same_call
            or instruction != self._last_instruction
            or transferred != self._transferred
            or (self._is_computing_progress and computed - self._computed > COMPUTING_SECONDS)
            or self._is_bounded(frame)
        )
        self._last_instruction, self._computed = instruction, computed
        self._transferred = transferred
        return has_moved

    def _is_bounded(self, innermost: FrameType) -> bool:
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code in self._bounded or frame.f_globals.get("__name__") in BOUNDED_MODULES:
                return True
            frame = frame.f_back
        return False

    def _cpu_seconds(self) -> float:
        return time.clock_gettime(self._clock)

    def _num_bytes(self) -> int:
        """Return what the thread has read and written so far: one call may copy a large file."""
        # Kernels may be built without these counts.
        with contextlib.suppress(OSError):
            lines = self._transfers.read_text(encoding="ascii").splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith(("rch", "wch")))
        return 0


def _code_of(function: Callable[..., object]) -> CodeType:
    code = function.__code__
    assert isinstance(code, CodeType)
    return code

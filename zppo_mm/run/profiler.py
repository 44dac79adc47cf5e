"""Traces of torch's profiler: of the steps that the configuration names, and of those that somebody
asks for while the run goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from zppo_mm.observability.metrics import StepMetrics, Sum
from zppo_mm.parallel import groups as parallel
from zppo_mm.run_folder import RunFolder

logger = logging.getLogger(__name__)


class StepProfiler:
    """Writes one trace per rank and profiled step. Every rank calls its methods together.

    A file asks for a trace, and not a signal: torchrun passes no SIGUSR2 on and is ended by it, and
    nobody has to find the right process on the right machine.

    Args:
        steps: To be profiled.
        folder: Of the run.
    """

    def __init__(self, steps: Sequence[int], folder: RunFolder) -> None:
        self._steps = frozenset(steps)
        self._folder = folder
        self._last_asked = 0
        self._num_failures = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the block, if the step is to be. A trace that cannot be written ends no run."""
        if not self._is_due(step):
            yield
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as measured:
            yield
        path = self._folder.profile_of(step, parallel.rank())
        unfinished = path.with_name("unfinished_" + path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            measured.export_chrome_trace(str(unfinished))
            unfinished.replace(path)
        except Exception:
            self._num_failures += 1
            logger.exception("the trace of step %d could not be written, the run goes on", step)
        else:
            if parallel.rank() == 0:
                logger.info("traces of step %d in %s", step, path.parent)

    def take_failures(self) -> StepMetrics:
        """Return how many traces of this rank could not be written since the last call."""
        metrics = StepMetrics()
        if self._num_failures:
            metrics.add("tracking/failures/profiler", Sum(self._num_failures))
        self._num_failures = 0
        return metrics

    def _is_due(self, step: int) -> bool:
        """Return the same on every rank: rank 0 alone reads the request, which is its file's
        removal.
        """
        asked = self._take_request() if parallel.rank() == 0 else 0
        if asked := parallel.broadcast_object(asked):
            self._last_asked = step + asked - 1
        return step in self._steps or step <= self._last_asked

    def _take_request(self) -> int:
        """Return for how many steps a file asks; 0 without one."""
        path = self._folder.profile_request
        if not os.path.lexists(path):
            return 0
        try:
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            path.unlink()
        except OSError as error:
            logger.warning("%s: the request for a trace cannot be taken, got %s", path, error)
            return 0
        return int(text) if text.isdecimal() and len(text) < 5 else 1

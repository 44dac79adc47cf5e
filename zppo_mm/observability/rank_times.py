"""Time by rank and phase: which rank keeps the others waiting, and by how much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

from zppo_mm.observability.metrics import Max, StepMetrics, Sum

logger = logging.getLogger(__name__)

SLOW_FRACTION = 0.2
"""How much longer than the median a rank takes that is called slow."""
NUM_STEPS = 5
"""Steps in a row in which the same rank must be slow before a warning."""


class PhaseMetrics(StepMetrics):
    """Measurements of one step on this rank, whose phases are also compared between ranks.

    Args:
        waited: Returns the seconds that this rank has waited for other replicas so far.
        mark: Makes a block that names a phase in a profiler's trace.

    Attributes:
        busy_seconds: By phase, the seconds in which this rank did not wait.
    """

    def __init__(
        self,
        waited: Callable[[], float] = lambda: 0.0,
        mark: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__()
        self._waited = waited
        self._mark = mark
        self.busy_seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to `seconds/<name>`, and those of them in which this
        rank did not wait to `busy_seconds`.
        """
        waited, before = self._waited(), self._seconds(name)
        try:
            with super().phase(name), self._mark(name):
                yield
        finally:
            busy = self._seconds(name) - before - (self._waited() - waited)
            self.busy_seconds[name] = self.busy_seconds.get(name, 0.0) + max(0.0, busy)

    def _seconds(self, name: str) -> float:
        found = self._metrics.get(f"seconds/{name}")
        return found.value if isinstance(found, Sum) else 0.0


@dataclass(frozen=True, slots=True)
class RankTimes:
    """What the ranks did in a step.

    Attributes:
        hosts: Machine of every rank.
        busy_seconds: Of every rank, by phase.
    """

    hosts: Sequence[str]
    busy_seconds: Sequence[Mapping[str, float]]

    @property
    def totals(self) -> list[float]:
        """Seconds of every rank in all phases together."""
        return [sum(phases.values()) for phases in self.busy_seconds]

    @property
    def slowest(self) -> int:
        """The rank with the most seconds."""
        return max(range(len(self.totals)), key=self.totals.__getitem__)

    @property
    def spread(self) -> float:
        """Fraction by which the slowest rank took longer than the median; 0 without any time."""
        middle = median(self.totals)
        return self.totals[self.slowest] / middle - 1 if middle else 0.0

    def by_phase(self) -> dict[str, list[float]]:
        """Return the seconds of all ranks by phase."""
        names = sorted({name for phases in self.busy_seconds for name in phases})
        return {name: [phases.get(name, 0.0) for phases in self.busy_seconds] for name in names}

    def metrics(self) -> StepMetrics:
        """Return the extremes by phase, and who is slowest; nothing for a single rank."""
        metrics = StepMetrics()
        if len(self.hosts) == 1:
            return metrics
        for name, seconds in self.by_phase().items():
            metrics.add(f"ranks/busy_most/{name}", Max(max(seconds)))
            metrics.add(f"ranks/busy_least/{name}", Max(min(seconds)))
        metrics.add("ranks/slowest", Max(self.slowest))
        metrics.add("ranks/spread", Max(self.spread))
        return metrics

    def record(self, step: int) -> dict[str, Any]:
        """Return a line of `ranks.jsonl`: milliseconds are enough of every rank."""
        seconds = {
            name: [round(each, 3) for each in values] for name, values in self.by_phase().items()
        }
        slowest = {"rank": self.slowest, "host": self.hosts[self.slowest]}
        return {"step": step, "slowest": slowest, "seconds": seconds}


class SlowRankWatch:
    """Warns of a rank that is slow in step after step, once per spell."""

    def __init__(self) -> None:
        self._rank = -1
        self._num_steps = 0

    def check(self, times: RankTimes) -> None:
        """Take note of a step."""
        rank = times.slowest if times.spread > SLOW_FRACTION else -1
        self._num_steps = self._num_steps + 1 if rank == self._rank else 1
        self._rank = rank
        if rank >= 0 and self._num_steps == NUM_STEPS:
            most = max(times.by_phase().items(), key=lambda each: each[1][rank] - median(each[1]))
            logger.warning(
                "rank %d on %s keeps the others waiting: %.0f %% longer than the median rank, %d "
                "steps in a row, most of it in %s",
                rank,
                times.hosts[rank],
                100 * times.spread,
                NUM_STEPS,
                most[0],
            )

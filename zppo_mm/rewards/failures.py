"""When grading fails too often: a run that grades everything wrong, or nothing, is not to go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from zppo_mm.errors import GradingError
from zppo_mm.rewards.functions import FunctionGrader
from zppo_mm.rewards.judge import LlmJudge

MIN_GRADED = 20
"""Grades before their share says anything: with 3 % malformed, one in 50,000 checks of so few
would see more than a quarter.
"""


@dataclass(frozen=True, slots=True)
class GradedCount:
    """What one replica graded, and an example of what failed."""

    num_graded: int
    num_failed: int
    example: str


class Watched(Protocol):
    """What grades on this rank."""

    def counted(self) -> GradedCount:
        """Return what it did so far."""
        ...

    def refusal(self, num_failed: int, num_graded: int, example: str, max_fraction: float) -> str:
        """Say why the run ends."""
        ...


@dataclass(frozen=True, slots=True)
class WatchedJudge:
    """A judge, whose replies may be malformed; `server` says where it runs."""

    judge: LlmJudge
    server: str

    def counted(self) -> GradedCount:
        counts = self.judge.counts
        return GradedCount(
            counts["judged"], counts["judge_malformed"], self.judge.malformed_example
        )

    def refusal(self, num_failed: int, num_graded: int, example: str, max_fraction: float) -> str:
        return (
            f"reward.judge: {self.server} does not give verdicts, got {num_failed} "
            f"malformed replies of {num_graded} ({num_failed / num_graded:.0%}), such as "
            f'{example!r}, expected {{"verdict": "correct"}} or {{"verdict": "wrong"}} in all '
            f"but {max_fraction:.0%}; give another judge (reward.judge_endpoints, "
            "reward.judge_model), raise reward.judge_max_tokens if replies are cut, or raise "
            "reward.max_malformed_fraction"
        )


@dataclass(frozen=True, slots=True)
class WatchedFunctions:
    """Reward functions, whose calls may fail."""

    functions: FunctionGrader

    def counted(self) -> GradedCount:
        made = self.functions
        return GradedCount(made.num_calls, made.num_errors + made.num_timeouts, made.failure)

    def refusal(self, num_failed: int, num_graded: int, example: str, max_fraction: float) -> str:
        return (
            f"reward.functions: too many calls fail, got {num_failed} of {num_graded} "
            f"({num_failed / num_graded:.0%}), such as {example}, expected a reward of all but "
            f"{max_fraction:.0%}; correct the function, raise reward.timeout_seconds if it is "
            "slow, or raise reward.max_failed_fraction"
        )


class FailureCheck:
    """Ends a run whose grading fails too often. Every rank has one.

    Args:
        watched: What grades on this rank; `None` on every rank if nothing does.
        max_fraction: Largest fraction that may fail.
        gather: Returns what every replica's leader passes, on every rank.
    """

    def __init__(
        self,
        watched: Watched | None,
        max_fraction: float,
        gather: Callable[[Sequence[GradedCount]], Sequence[Sequence[GradedCount]]],
    ) -> None:
        self._watched = watched
        self._max_fraction = max_fraction
        self._gather = gather
        self._seen = GradedCount(0, 0, "")

    def __call__(self) -> None:
        """Check the grades since the last check that had enough of them; every rank calls this.

        Raises:
            GradingError: On every rank, if too many of them failed.
        """
        if self._watched is None:
            return
        now = self._watched.counted()
        local = GradedCount(
            now.num_graded - self._seen.num_graded,
            now.num_failed - self._seen.num_failed,
            now.example,
        )
        counts = [count for replica in self._gather([local]) for count in replica]
        num_graded = sum(count.num_graded for count in counts)
        num_failed = sum(count.num_failed for count in counts)
        if num_graded < MIN_GRADED:
            return
        self._seen = now
        if num_failed > self._max_fraction * num_graded:
            example = next(count.example for count in counts if count.num_failed)
            raise GradingError(
                self._watched.refusal(num_failed, num_graded, example, self._max_fraction)
            )

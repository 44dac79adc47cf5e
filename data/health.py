"""Count good, bad and too long samples, name the bad ones, and stop a run that meets too many."""

from __future__ import annotations

import logging
from typing import Any

from data.errors import DataError, shown
from data.text import clean_text

logger = logging.getLogger(__name__)

TOO_LONG = "too_long"
"""Reason of a question that is left out although nothing is wrong with it: its plain prompt has
more tokens than a run takes.
"""
MIN_SAMPLES = 20  # a fraction of fewer samples says nothing
MAX_ID_LENGTH = 4096
MAX_LISTED = 100  # bad samples kept by name, so that state and messages stay small


class SampleHealth:
    """Counters of the samples met so far.

    Attributes:
        num_good: Samples that could be used.
        num_too_long: Samples that were left out for their length, neither good nor bad.
        counts: Bad samples by reason.
        listed: The first bad samples: `(sample id, reason, detail)`.
    """

    def __init__(self, max_bad_fraction: float = 0.05, strict: bool = False) -> None:
        """Start with nothing counted.

        Args:
            max_bad_fraction: Largest fraction of bad samples, checked once 20 samples were met.
            strict: Raise at the first bad sample.

        Raises:
            DataError: The fraction is not between 0 and 1.
        """
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise DataError(
                f"SampleHealth: max_bad_fraction is not a fraction, got {max_bad_fraction}, "
                "expected 0 to 1; correct it"
            )
        self.max_bad_fraction = max_bad_fraction
        self.strict = strict
        self.num_good = 0
        self.num_too_long = 0
        self.counts: dict[str, int] = {}
        self.listed: list[tuple[str, str, str]] = []

    @property
    def num_bad(self) -> int:
        """Bad samples over all reasons."""
        return sum(self.counts.values())

    @property
    def bad_fraction(self) -> float:
        """Fraction of bad samples among those met; 0 before the first."""
        num_met = self.num_good + self.num_bad
        return self.num_bad / num_met if num_met else 0.0

    def good(self, n: int = 1) -> None:
        """Count usable samples.

        Raises:
            DataError: Enough samples were met by now to see that too many of them are bad.
        """
        self.num_good += n
        self._check_fraction()

    def bad(self, sample_id: str, reason: str, detail: str, *, was_good: bool = False) -> None:
        """Count one bad sample, name it in the log, and stop when there are too many.

        Args:
            sample_id: Where the sample lies, e.g. `shard.tar:key`, or the question's id.
            reason: Short fixed name to count by, e.g. `bad_json`.
            detail: What is wrong.
            was_good: The sample was counted by `good` before; its media failed later.

        Raises:
            DataError: `strict`, or the fraction of bad samples is above `max_bad_fraction`.
        """
        # The key of a foreign shard, and the names of its files, may hold anything.
        readable = shown(sample_id, MAX_ID_LENGTH)
        detail = clean_text(detail.removeprefix(f"{sample_id}: ").removeprefix(f"{readable}: "))
        sample_id = readable
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if was_good:
            self.num_good = max(0, self.num_good - 1)
        if len(self.listed) < MAX_LISTED:
            self.listed.append((sample_id, reason, detail))
        logger.warning("skipped sample %s: %s: %s", sample_id, reason, detail)
        if self.strict:
            raise DataError(
                f"data: sample {sample_id} is bad ({reason}): {detail}; correct or remove it, or "
                "run without strict"
            )
        self._check_fraction()

    def too_long(self, sample_id: str, detail: str) -> None:
        """Count a sample, counted by `good` before, that is left out for its length; the first is
        named in the log.

        Args:
            sample_id: The question's id.
            detail: Its length and the limit.
        """
        self.num_good = max(0, self.num_good - 1)
        self.num_too_long += 1
        if self.num_too_long == 1:
            logger.warning(
                "questions with too long a prompt are left out and counted, the first is %s: %s",
                shown(sample_id, MAX_ID_LENGTH),
                detail,
            )

    def _check_fraction(self) -> None:
        if self.num_good + self.num_bad < MIN_SAMPLES or self.bad_fraction <= self.max_bad_fraction:
            return
        lines = [f"  {sample_id}: {reason}: {detail}" for sample_id, reason, detail in self.listed]
        if self.num_bad > len(self.listed):
            lines.append(f"  … and {self.num_bad - len(self.listed)} more")
        raise DataError(
            f"data: too many bad samples, got {self.num_bad} of {self.num_good + self.num_bad} "
            f"({self.bad_fraction:.1%}), expected at most {self.max_bad_fraction:.1%}; correct "
            "them or raise data.max_bad_fraction:\n" + "\n".join(lines)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as JSON values."""
        return {
            "num_good": self.num_good,
            "num_too_long": self.num_too_long,
            "counts": dict(self.counts),
            "listed": [list(entry) for entry in self.listed],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved counters."""
        self.num_good = int(state["num_good"])
        self.num_too_long = int(state.get("num_too_long", 0))
        self.counts = {str(reason): int(count) for reason, count in state["counts"].items()}
        self.listed = [
            (str(sample_id), str(reason), str(detail))
            for sample_id, reason, detail in state["listed"]
        ]

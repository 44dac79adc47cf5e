"""Count good, bad and left out samples, name the bad ones, and stop where too many are bad."""

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
        left_out: Samples that are neither good nor bad, by reason: too long, or without a judge.
        counts: Bad samples by reason.
        listed: The first bad samples: `(sample id, reason, detail)`.
    """

    def __init__(
        self,
        max_bad_fraction: float = 0.05,
        strict: bool = False,
        *,
        option: str = "data.max_bad_fraction",
        at_end: bool = False,
    ) -> None:
        """Start with nothing counted.

        Args:
            max_bad_fraction: Largest fraction of bad samples, checked once 20 samples were met.
            strict: Raise at the first bad sample.
            option: What sets the fraction, for messages.
            at_end: The samples are those of one file: the fraction is checked by `finish`, and
                before it only whether anything is good at all.

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
        self._option, self._at_end = option, at_end
        self.num_good = 0
        self.left_out: dict[str, int] = {}
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
        if self.strict:
            raise DataError(
                f"data: sample {sample_id} is bad ({reason}): {detail}; correct or remove it, or "
                "run without strict"
            )
        logger.warning("skipped sample %s: %s: %s", sample_id, reason, detail)
        self._check_fraction()

    def leave_out(
        self, sample_id: str, reason: str, detail: str, *, was_good: bool = False
    ) -> None:
        """Count a sample that is left out although nothing is wrong with it; the first of each
        reason is named in the log.

        Args:
            sample_id: The question's id, or where the sample lies.
            reason: Short fixed name to count by.
            detail: Why it is left out.
            was_good: The sample was counted by `good` before.
        """
        if was_good:
            self.num_good = max(0, self.num_good - 1)
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        if self.left_out[reason] == 1:
            logger.warning(
                "skipped sample %s: %s: %s (no bad one; others are only counted)",
                shown(sample_id, MAX_ID_LENGTH),
                reason,
                detail,
            )

    def examples(self) -> str:
        """Return what is wrong with the first bad samples; where each was named just above, only
        that.
        """
        if self._at_end:
            return "they are named above"
        return "; ".join(detail for _, _, detail in self.listed[:5])

    def finish(self) -> None:
        """Check the fraction of bad samples after the last one.

        Raises:
            DataError: It is above `max_bad_fraction`, and there are enough samples to say so.
        """
        if self.num_good + self.num_bad >= MIN_SAMPLES:
            self._raise_if_above()

    def _check_fraction(self) -> None:
        if not self._at_end:
            self.finish()
        elif self.num_bad == MAX_LISTED and self.num_good == 0:
            self._raise_if_above()

    def _raise_if_above(self) -> None:
        if self.bad_fraction <= self.max_bad_fraction:
            return
        message = (
            f"data: too many bad samples, got {self.num_bad} of {self.num_good + self.num_bad} "
            f"({self.bad_fraction:.1%}), expected at most {self.max_bad_fraction:.1%}; correct "
            f"them or raise {self._option}"
        )
        if self._at_end:  # each was named just above
            raise DataError(message)
        lines = [f"  {sample_id}: {reason}: {detail}" for sample_id, reason, detail in self.listed]
        if self.num_bad > len(self.listed):
            lines.append(f"  … and {self.num_bad - len(self.listed)} more")
        raise DataError(f"{message}:\n" + "\n".join(lines))

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as JSON values."""
        return {
            "num_good": self.num_good,
            "left_out": dict(self.left_out),
            "counts": dict(self.counts),
            "listed": [list(entry) for entry in self.listed],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved counters."""
        self.num_good = int(state["num_good"])
        self.left_out = {str(reason): int(count) for reason, count in state["left_out"].items()}
        self.counts = {str(reason): int(count) for reason, count in state["counts"].items()}
        self.listed = [
            (str(sample_id), str(reason), str(detail))
            for sample_id, reason, detail in state["listed"]
        ]

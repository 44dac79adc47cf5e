"""When the judge's replies are no verdicts: a run that grades everything wrong is not to go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zppo_mm.errors import JudgeError
from zppo_mm.rewards.judge import LlmJudge

MIN_JUDGED = 20
"""Judgements before their share says anything: with 3 % malformed, one in 50,000 checks of so few
would see more than a quarter.
"""


@dataclass(frozen=True, slots=True)
class JudgedCount:
    """What one replica's judge did since the last check that counted."""

    num_judged: int
    num_malformed: int
    example: str


class MalformedCheck:
    """Ends a run whose judge does not give verdicts. Every rank has one.

    Args:
        judge: Of this rank; `None` on every rank if there is none.
        server: Where it runs, for the message.
        max_fraction: Largest share of malformed replies.
        gather: Returns what every replica's leader passes, on every rank.
    """

    def __init__(
        self,
        judge: LlmJudge | None,
        server: str,
        max_fraction: float,
        gather: Callable[[Sequence[JudgedCount]], Sequence[Sequence[JudgedCount]]],
    ) -> None:
        self._judge = judge
        self._server = server
        self._max_fraction = max_fraction
        self._gather = gather
        self._seen = (0, 0)

    def __call__(self) -> None:
        """Check the judgements since the last check that had enough of them; every rank calls this.

        Raises:
            JudgeError: On every rank, if too many of them are malformed.
        """
        if self._judge is None:
            return
        now = (self._judge.counts["judged"], self._judge.counts["judge_malformed"])
        local = JudgedCount(
            now[0] - self._seen[0], now[1] - self._seen[1], self._judge.malformed_example
        )
        counts = [count for replica in self._gather([local]) for count in replica]
        num_judged = sum(count.num_judged for count in counts)
        num_malformed = sum(count.num_malformed for count in counts)
        if num_judged < MIN_JUDGED:
            return
        self._seen = now
        if num_malformed > self._max_fraction * num_judged:
            example = next(count.example for count in counts if count.num_malformed)
            raise JudgeError(
                f"reward.judge: {self._server} does not give verdicts, got {num_malformed} "
                f"malformed replies of {num_judged} ({num_malformed / num_judged:.0%}), such as "
                f'{example!r}, expected {{"verdict": "correct"}} or {{"verdict": "wrong"}} in all '
                f"but {self._max_fraction:.0%}; give another judge (reward.judge_endpoints, "
                "reward.judge_model), raise reward.judge_max_tokens if replies are cut, or raise "
                "reward.max_malformed_fraction"
            )

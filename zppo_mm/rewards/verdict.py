"""The grade of one response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal[
    "match", "mismatch", "not_boxed", "too_long", "function", "timeout", "error", "no_verdict"
]
NOT_GRADED: tuple[Reason, ...] = ("timeout", "error", "no_verdict")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade of one response.

    Attributes:
        parsed: Content of the last `\\boxed{}`, `None` if nothing was boxed.
        reward: In [0, 1], 1 if the answer is right; `None` if it was not graded.
        reason: Not graded are `no_verdict` of the judge, and `timeout` and `error`: the comparison
            or the reward function itself failed. `function` is the grade of a reward function.
        parts: Of the reward, each in [0, 1], by name; only a reward function gives any.
    """

    parsed: str | None
    reward: float | None
    reason: Reason
    parts: Mapping[str, float] = field(default_factory=dict)

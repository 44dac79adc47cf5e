"""Match audit: do answers to BCQ and NCQ prompts repeat those of the candidates?

A BCQ accuracy near 1, with nearly every answer the right candidate's, would mean that the
candidates give themselves away. Source: ZPPO, match audit near the end of training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from zppo_mm.experience import Group


@dataclass(frozen=True, slots=True)
class MatchAudit:
    """Counts over the rollouts of some groups.

    Attributes:
        num_bcq: Rollouts of BCQ prompts.
        bcq_right: Of those, answers equal to the right candidate's.
        bcq_wrong: Of those, answers equal to the wrong candidate's.
        num_ncq: Rollouts of NCQ prompts.
        ncq_listed: Of those, answers equal to one that the prompt lists as wrong.
    """

    num_bcq: int
    bcq_right: int
    bcq_wrong: int
    num_ncq: int
    ncq_listed: int


def audit_matches(groups: Iterable[Group]) -> MatchAudit:
    """Count over all BCQ and NCQ groups; rollouts without a parsed answer match nothing, but count
    in the totals.
    """
    groups = list(groups)
    bcq = [group for group in groups if group.kind == "bcq"]
    ncq = [group for group in groups if group.kind == "ncq"]
    return MatchAudit(
        num_bcq=sum(len(group.rollouts) for group in bcq),
        bcq_right=sum(_num_matches(group, correct=True) for group in bcq),
        bcq_wrong=sum(_num_matches(group, correct=False) for group in bcq),
        num_ncq=sum(len(group.rollouts) for group in ncq),
        ncq_listed=sum(_num_matches(group, correct=False) for group in ncq),
    )


def comparable_answer(answer: str) -> str:
    """Return an answer without what never changes its meaning: outer spaces and dollars, inner
    spacing, case, a closing full stop.
    """
    return re.sub(r"\s+", " ", answer.strip().rstrip(".").strip("$").strip().rstrip(".")).casefold()


def num_matches(parsed: Iterable[str | None], shown: Iterable[str | None]) -> int:
    """Count the parsed answers that equal one of the shown ones; no answer equals nothing."""
    answers = {comparable_answer(answer) for answer in shown if answer is not None}
    return sum(answer is not None and comparable_answer(answer) in answers for answer in parsed)


def _num_matches(group: Group, correct: bool) -> int:
    """Count the rollouts of one group whose answer equals that of a candidate of the given
    correctness.
    """
    shown = [
        candidate.answer for candidate in group.instance.candidates if candidate.correct == correct
    ]
    return num_matches([rollout.parsed for rollout in group.rollouts], shown)

"""From a response to its reward: rules first, killable algebra where rules do not decide, a judge
for open questions.

Source: ZPPO (arXiv 2606.18216), reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from data.question import Question
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.choice import matches_choice
from zppo_mm.rewards.mathematics import MAX_ANSWER_CHARS, Undecided, compare
from zppo_mm.rewards.workers import GradingPool, Outcome

Reason = Literal["match", "mismatch", "not_boxed", "too_long", "timeout", "error", "no_verdict"]
NOT_GRADED: tuple[Reason, ...] = ("timeout", "error", "no_verdict")
_REASON_OF_OUTCOME: dict[Outcome, Reason] = {
    "equal": "match",
    "different": "mismatch",
    "timeout": "timeout",
    "error": "error",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade of one response.

    Attributes:
        parsed: Content of the last `\\boxed{}`, `None` if nothing was boxed.
        reward: 1 if the answer is right, 0 if it is wrong, `None` if it was not graded.
        reason: `match` is right. Not graded are `no_verdict` of the judge, and `timeout` and
            `error`: the comparison itself failed. All others are wrong.
    """

    parsed: str | None
    reward: float | None
    reason: Reason


class Judge(Protocol):
    """Compares free-form answers with their references; never solves.

    Responses are graded on one rank of each replica, the replicas at times of their own. So a judge
    must be callable from one rank alone, such as a model behind a server. A model that is spread
    over ranks of this run, such as the in-process teacher, must not be one: its ranks would wait
    for each other for ever. It needs a stage of its own that all ranks enter.
    """

    def judge(self, items: Sequence[tuple[Question, str]]) -> Sequence[bool | None]:
        """Return for every (question, parsed answer) whether it agrees with the reference answer;
        `None` if the judge cannot be had.
        """
        ...


class _Rules:
    """Grades by looking, equal answers to equal references once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, tuple[str, ...], str], Reason | Undecided | None] = {}

    def grade(self, question: Question, parsed: str | None) -> Reason | Undecided | None:
        """Return the reason if rules decide, the pair if algebra has to, `None` if a judge has
        to.
        """
        if parsed is None:
            return "not_boxed"
        if parsed == question.answer and question.answer_type == "math":
            return "match"
        key = (question.answer, question.answer_type, question.choices, parsed)
        if key not in self._known:
            self._known[key] = self._look(question, parsed)
        return self._known[key]

    def _look(self, question: Question, parsed: str) -> Reason | Undecided | None:
        if question.answer_type == "open":
            return "too_long" if len(parsed) > MAX_ANSWER_CHARS else None
        if question.answer_type == "choice":
            return "match" if matches_choice(parsed, question) else "mismatch"
        gold = (
            question.answer
            if "\\boxed" not in question.answer
            else final_answer(question.answer) or question.answer
        )
        verdict = compare(parsed, gold)
        if isinstance(verdict, Undecided):
            return verdict
        if not verdict and len(parsed) > MAX_ANSWER_CHARS:
            return "too_long"
        return "match" if verdict else "mismatch"


class Verifier:
    """Grades responses. May be used from any thread.

    Args:
        timeout_seconds: Processor time of one comparison by algebra.
        num_workers: Most worker processes; they start when the first answer needs one.
        judge: For questions of answer type `open`.
        budget_seconds: Wall-clock time for all comparisons by algebra of one call.
    """

    def __init__(
        self,
        timeout_seconds: float = 5.0,
        num_workers: int = 2,
        judge: Judge | None = None,
        budget_seconds: float = 60.0,
    ) -> None:
        if min(timeout_seconds, budget_seconds) <= 0 or num_workers < 1:
            raise ConfigError(
                f"reward: out of range, got timeout_seconds={timeout_seconds}, "
                f"budget_seconds={budget_seconds} and num_workers={num_workers}, expected positive "
                "limits and at least one worker; correct the three keys"
            )
        self.judge = judge
        self._pool = GradingPool(timeout_seconds, num_workers, budget_seconds)

    @property
    def num_timeouts(self) -> int:
        """Comparisons ended by a limit so far."""
        return self._pool.num_timeouts

    @property
    def num_errors(self) -> int:
        """Comparisons in which the library failed so far."""
        return self._pool.num_errors

    def can_grade(self, question: Question) -> bool:
        """Return whether responses to a question can be graded: an `open` one needs a judge."""
        return question.answer_type != "open" or self.judge is not None

    def verify(self, question: Question, text: str) -> Verdict:
        """Grade one response; see `verify_all`."""
        return self.verify_all([(question, text)])[0]

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """Grade (question, response text) pairs, in order; equal comparisons are made once.

        Raises:
            ConfigError: If a question is `open` and there is no judge.
            DataError: If the reference answer of a multiple-choice question is no option's letter.
        """
        self._check_judge(items)
        answers = [final_answer(text) for _, text in items]
        rules = _Rules()
        graded = [
            rules.grade(question, parsed)
            for (question, _), parsed in zip(items, answers, strict=True)
        ]
        pairs = list(
            dict.fromkeys(
                (grade.parsed, grade.gold) for grade in graded if isinstance(grade, Undecided)
            )
        )
        outcomes = dict(zip(pairs, self._pool.compare_all(pairs) if pairs else [], strict=True))
        judged = iter(
            self._by_judge(
                [
                    (q, p)
                    for (q, _), p, g in zip(items, answers, graded, strict=True)
                    if g is None and p is not None
                ]
            )
        )
        verdicts: list[Verdict] = []
        for parsed, grade in zip(answers, graded, strict=True):
            if isinstance(grade, Undecided):
                reason = _REASON_OF_OUTCOME[outcomes[grade.parsed, grade.gold]]
            else:
                reason = next(judged) if grade is None else grade
            verdicts.append(
                Verdict(parsed, None if reason in NOT_GRADED else float(reason == "match"), reason)
            )
        return verdicts

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _by_judge(self, items: Sequence[tuple[Question, str]]) -> list[Reason]:
        if not items:
            return []
        assert self.judge is not None
        return [
            "no_verdict" if right is None else "match" if right else "mismatch"
            for right in self.judge.judge(items)
        ]

    def _check_judge(self, items: Sequence[tuple[Question, str]]) -> None:
        asked = next((question for question, _ in items if not self.can_grade(question)), None)
        if asked is not None:
            raise ConfigError(
                f"Verifier: question {asked.id!r} has answer_type 'open' and there is no judge, "
                "expected math or choice; give the Verifier a judge or leave such questions out of "
                "the data"
            )

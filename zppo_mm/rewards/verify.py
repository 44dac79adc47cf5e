"""From a response to its reward: a reward function grades all of it, or the rules of its question's
answer type what it boxes, and a judge what these leave open.

Source: ZPPO (arXiv 2606.18216), reward.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from data.question import Question
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.choice import matches_choice, names_an_option
from zppo_mm.rewards.functions import FunctionGrader
from zppo_mm.rewards.mathematics import MAX_ANSWER_CHARS, Undecided, compare
from zppo_mm.rewards.verdict import NOT_GRADED, Reason, Verdict
from zppo_mm.rewards.workers import GradingPool, Outcome

_REASON_OF_OUTCOME: dict[Outcome, Reason] = {
    "equal": "match",
    "different": "mismatch",
    "timeout": "timeout",
    "error": "error",
}

OPEN = "open"
"""The answer type that has no rules."""
LEFT_OPEN: tuple[Reason, ...] = ("mismatch", "not_boxed", "timeout", "error")
"""What a judge that is a fallback decides."""

Item = tuple[Question, str]
"""A question and the final answer of a response to it."""


class Reward(Protocol):
    """Grades answers to questions of one answer type."""

    def grade_all(self, items: Sequence[Item]) -> Sequence[Verdict]:
        """Return one verdict per item, in order."""
        ...


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """What a judge is shown.

    Attributes:
        question: With the reference answer.
        text: The final answer of a response, or all of the response if it boxes none.
        is_final_answer: Which of the two.
    """

    question: Question
    text: str
    is_final_answer: bool


class Judge(Protocol):
    """Compares responses with their references; never solves.

    Responses are graded on one rank of each replica, the replicas at times of their own. So a judge
    must be callable from one rank alone, such as a model behind a server. A model that is spread
    over ranks of this run, such as the in-process teacher, must not be one: its ranks would wait
    for each other for ever. It needs a stage of its own that all ranks enter.
    """

    def judge(self, items: Sequence[JudgedResponse]) -> Sequence[bool | None]:
        """Return for every response whether it agrees with the reference answer; `None` if the
        judge is unavailable.
        """
        ...


class MathReward:
    """1 for an answer of the same value and structure as the reference."""

    def __init__(self, pool: GradingPool) -> None:
        self._pool = pool

    def grade_all(self, items: Sequence[Item]) -> list[Verdict]:
        """Grade by text, and by algebra in the pool where the text does not decide."""
        compared = {item: self._compare(*item) for item in dict.fromkeys(items)}
        pairs = list(
            dict.fromkeys(each for each in compared.values() if isinstance(each, Undecided))
        )
        outcomes = self._pool.compare_all([(each.parsed, each.gold) for each in pairs])
        reasons = {
            pair: _REASON_OF_OUTCOME[outcome] for pair, outcome in zip(pairs, outcomes, strict=True)
        }
        return [
            _verdict(item[1], reasons[each] if isinstance(each, Undecided) else each)
            for item, each in ((item, compared[item]) for item in items)
        ]

    def _compare(self, question: Question, parsed: str) -> Reason | Undecided:
        if parsed == question.answer:
            return "match"
        boxed = final_answer(question.answer) if "\\boxed" in question.answer else None
        verdict = compare(parsed, boxed or question.answer)
        if isinstance(verdict, Undecided):
            return verdict
        if not verdict and len(parsed) > MAX_ANSWER_CHARS:
            return "too_long"
        return "match" if verdict else "mismatch"


class ChoiceReward:
    """1 for an answer that names the right option."""

    def grade_all(self, items: Sequence[Item]) -> list[Verdict]:
        """Grade by letter and by text.

        Raises:
            DataError: If a reference answer names no option.
        """
        matches = {item: matches_choice(item[1], item[0]) for item in dict.fromkeys(items)}
        return [_verdict(item[1], "match" if matches[item] else "mismatch") for item in items]


class _LeftOpen:
    """No rules: what is not too long is left to the judge."""

    def grade_all(self, items: Sequence[Item]) -> list[Verdict]:
        return [
            _verdict(parsed, "too_long" if len(parsed) > MAX_ANSWER_CHARS else "mismatch")
            for _, parsed in items
        ]


def _shown(question: Question, text: str, parsed: str | None) -> JudgedResponse:
    return JudgedResponse(question, text if parsed is None else parsed, parsed is not None)


def _verdict(parsed: str | None, reason: Reason) -> Verdict:
    return Verdict(parsed, None if reason in NOT_GRADED else float(reason == "match"), reason)


def _check_range(answer_type: str, graded: Sequence[Verdict]) -> None:
    for verdict in graded:
        if verdict.reward is not None and not 0 <= verdict.reward <= 1:
            raise ValueError(
                f"Verifier: the reward of answer type {answer_type!r} is out of range, got "
                f"{verdict.reward}, expected a number from 0 to 1; scale it"
            )


class Verifier:
    """Grades responses. May be used from any thread.

    Args:
        timeout_seconds: Processor time of one comparison by algebra.
        num_workers: Most worker processes; they start when the first answer needs one.
        judge: Decides what `judge_mode` says.
        budget_seconds: Wall-clock time for all comparisons by algebra of one call.
        rewards: More of them, or others, by answer type.
        functions: Reward functions by answer type, `module:function` or `file.py:function`; they
            take precedence over `rewards`.
        judge_mode: What the judge decides: `open`, questions of that answer type; `fallback`, also
            what the rules do not call right; `never`, nothing.

    Attributes:
        rewards: What grades by rules, by answer type.
        functions: What grades by reward functions.
    """

    def __init__(
        self,
        timeout_seconds: float = 5.0,
        num_workers: int = 2,
        judge: Judge | None = None,
        budget_seconds: float = 60.0,
        rewards: Mapping[str, Reward] | None = None,
        judge_mode: str = "open",
        functions: Mapping[str, str] | None = None,
    ) -> None:
        if min(timeout_seconds, budget_seconds) <= 0 or num_workers < 1:
            raise ConfigError(
                f"reward: out of range, got timeout_seconds={timeout_seconds}, "
                f"budget_seconds={budget_seconds} and num_workers={num_workers}, expected positive "
                "limits and at least one worker; correct the three keys"
            )
        self._pool = GradingPool(timeout_seconds, num_workers, budget_seconds)
        self.rewards: dict[str, Reward] = {
            "math": MathReward(self._pool),
            "choice": ChoiceReward(),
            **(rewards or {}),
        }
        self.functions = FunctionGrader(
            functions or {}, timeout_seconds, num_workers, budget_seconds
        )
        self._ruled_by_us = {"math", "choice"} - {*(rewards or {}), *self.functions.functions}
        self._judge = judge
        self._judge_mode = judge_mode

    @property
    def num_timeouts(self) -> int:
        """Comparisons and calls of reward functions ended by a limit so far."""
        return self._pool.num_timeouts + self.functions.num_timeouts

    @property
    def num_errors(self) -> int:
        """Comparisons in which the library failed so far."""
        return self._pool.num_errors

    def with_judge_mode(self, judge_mode: str) -> Verifier:
        """Return one that shares everything with this one but what the judge decides."""
        return self.with_judge(self._judge, judge_mode)

    def with_judge(self, judge: Judge | None, judge_mode: str) -> Verifier:
        """Return one that shares everything with this one but the judge and what it decides."""
        other = copy.copy(self)
        other._judge, other._judge_mode = judge, judge_mode
        return other

    def can_grade(self, question: Question) -> bool:
        """Return whether responses to a question can be graded: an `open` one needs a judge."""
        return self._is_ruled(question.answer_type) or self._is_for_judge(question)

    def verify(self, question: Question, text: str) -> Verdict:
        """Grade one response; see `verify_all`."""
        return self.verify_all([(question, text)])[0]

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """Grade (question, response text) pairs, in order.

        Raises:
            ConfigError: If a question is `open` and there is no judge.
            DataError: If the reference answer of a multiple-choice question is no option's letter.
            ValueError: If a reward is not in [0, 1].
        """
        self._check_types(items)
        verdicts = self._grade_by_functions_or_rules(items)
        asked = [
            index
            for index, ((question, _), verdict) in enumerate(zip(items, verdicts, strict=True))
            if self._asks_judge(question, verdict)
        ]
        if self._judge is None or not asked:
            return verdicts
        shown = [_shown(*items[index], verdicts[index].parsed) for index in asked]
        reasons: dict[bool | None, Reason] = {True: "match", False: "mismatch", None: "no_verdict"}
        for index, is_right in zip(asked, self._judge.judge(shown), strict=True):
            verdicts[index] = _verdict(verdicts[index].parsed, reasons[is_right])
        return verdicts

    def _grade_by_functions_or_rules(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        called = [
            index
            for index, (question, _) in enumerate(items)
            if question.answer_type in self.functions.functions
        ]
        if not called:
            return self._grade_by_rules(items)
        verdicts: dict[int, Verdict] = dict(
            zip(called, self.functions.grade_all([items[i] for i in called]), strict=True)
        )
        others = [index for index in range(len(items)) if index not in verdicts]
        verdicts.update(zip(others, self._grade_by_rules([items[i] for i in others]), strict=True))
        return [verdicts[index] for index in range(len(items))]

    def _grade_by_rules(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """Grade what is boxed; answers to `open` questions are the judge's."""
        answers = [final_answer(text) for _, text in items]
        of_type: dict[str, dict[int, Item]] = {}
        for index, ((question, _), parsed) in enumerate(zip(items, answers, strict=True)):
            if parsed is not None:
                of_type.setdefault(question.answer_type, {})[index] = question, parsed
        verdicts = [_verdict(None, "not_boxed")] * len(items)
        for answer_type, asked in of_type.items():
            reward = self.rewards.get(answer_type, _LeftOpen())
            graded = reward.grade_all(list(asked.values()))
            _check_range(answer_type, graded)
            for index, verdict in zip(asked, graded, strict=True):
                verdicts[index] = verdict
        return verdicts

    def _is_for_judge(self, question: Question) -> bool:
        """Return whether the judge alone grades responses to a question."""
        return (
            self._judge is not None
            and self._judge_mode != "never"
            and question.answer_type == OPEN
            and not self._is_ruled(OPEN)
        )

    def _is_ruled(self, answer_type: str) -> bool:
        return answer_type in self.rewards or answer_type in self.functions.functions

    def _asks_judge(self, question: Question, verdict: Verdict) -> bool:
        if verdict.reason not in LEFT_OPEN:
            return False
        if self._is_for_judge(question):
            return True
        if self._judge_mode != "fallback" or question.answer_type not in self._ruled_by_us:
            return False
        # Another option's letter or text is a wrong answer, not an unclear one.
        return not (
            question.answer_type == "choice"
            and verdict.parsed is not None
            and names_an_option(verdict.parsed, question)
        )

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()
        self.functions.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_types(self, items: Sequence[tuple[Question, str]]) -> None:
        asked = next((question for question, _ in items if not self.can_grade(question)), None)
        if asked is not None:
            raise ConfigError(
                f"Verifier: question {asked.id!r} has answer_type {asked.answer_type!r} and there "
                f"is no {'judge' if asked.answer_type == 'open' else 'such reward'}, expected one "
                f"of {', '.join({**self.rewards, **self.functions.functions})}; give the run a "
                "judge or a function (reward.functions), or leave such questions out of the data"
            )

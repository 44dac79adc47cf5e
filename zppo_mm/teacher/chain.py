"""Several teachers: each is asked what all before it did not solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.question import Question
from zppo_mm.experience import Rollout
from zppo_mm.teacher.teacher import Answers, Teacher


@dataclass(slots=True)
class ChainAnswers:
    """Answers of the first teacher on their way; the others are asked when these are there. Implements `Answers`."""

    chain: TeacherChain
    questions: Sequence[Question]
    step: int
    first: Answers
    seconds: float = 0.0

    @property
    def is_pending(self) -> bool:
        """Whether the first teacher's answers come meanwhile."""
        return self.first.is_pending

    def is_ready(self) -> bool:
        """Return whether nobody needs to be waited for: who else is asked is known only when the first has answered."""
        return self.first.is_ready() and not self.first.is_pending

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        """Return all rollouts of all teachers that were asked, by question id."""
        answers = dict(self.first.wait())
        self.seconds = self.first.seconds
        for teacher in self.chain.others:
            unsolved = [question for question in self.questions if not any(rollout.reward >= 1 for rollout in answers[question.id])]
            if not unsolved:
                break
            self.chain.num_passed_on += len(unsolved)
            asked = teacher.ask(unsolved, self.step)
            for question_id, rollouts in asked.wait().items():
                answers[question_id] = (*answers[question_id], *rollouts)
            self.seconds += asked.seconds
        return answers


class TeacherChain:
    """Asks a question of one teacher after the other until one solves it; the first rewrites. Implements `Teacher`.

    Args:
        teachers: At least one, in their order.

    Attributes:
        num_passed_on: Questions that a further teacher was asked so far, counted once per teacher.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.first, *self.others = teachers
        self.num_passed_on = 0

    def ask(self, questions: Sequence[Question], step: int) -> ChainAnswers:
        """Ask the first teacher."""
        return ChainAnswers(self, questions, step, self.first.ask(questions, step))

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        """Return one response of the first teacher per user text."""
        return self.first.rewrite(texts, step, attempt)

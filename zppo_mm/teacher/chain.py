"""Several teachers: each is asked what all before it did not solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.question import Question
from zppo_mm.experience import Rollout
from zppo_mm.teacher.teacher import Answers, Teacher


class ChainAnswers:
    """Answers of all teachers on their way: the next one is asked as soon as one is seen to have
    answered. Implements `Answers`.

    Args:
        chain: The teachers.
        questions: What is asked.
        step: Rollout step.
    """

    def __init__(self, chain: TeacherChain, questions: Sequence[Question], step: int) -> None:
        self.seconds = 0.0
        self._chain = chain
        self._questions = questions
        self._step = step
        self._rollouts: dict[str, tuple[Rollout, ...]] = {question.id: () for question in questions}
        self._later = list(chain.others)
        self._asked: Answers | None = chain.first.submit(questions, step)

    def is_ready(self) -> bool:
        """Return whether nobody needs to be waited for."""
        while self._asked is not None and self._asked.is_ready():
            self._asked = self._pass_on(self._asked)
        return self._asked is None

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        """Return all rollouts of all teachers that were asked, by question id."""
        while self._asked is not None:
            self._asked = self._pass_on(self._asked)
        return self._rollouts

    def _pass_on(self, asked: Answers) -> Answers | None:
        """Wait for a teacher, and ask the next one what nobody solved so far; `None` if there is
        nothing more to ask.
        """
        for question_id, rollouts in asked.wait().items():
            self._rollouts[question_id] += rollouts
        self.seconds += asked.seconds
        unsolved = [
            question
            for question in self._questions
            if not any(each.is_correct for each in self._rollouts[question.id])
        ]
        if not (unsolved and self._later):
            return None
        self._chain.num_passed_on += len(unsolved)
        return self._later.pop(0).submit(unsolved, self._step)


class TeacherChain:
    """Asks a question of one teacher after the other until one solves it; the first rewrites.
    Implements `Teacher`.

    Args:
        teachers: At least one, in their order.

    Attributes:
        num_passed_on: Questions that a further teacher was asked so far, counted once per teacher.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.first, *self.others = teachers
        self.num_passed_on = 0

    def submit(self, questions: Sequence[Question], step: int) -> ChainAnswers:
        """Ask the first teacher."""
        return ChainAnswers(self, questions, step)

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        """Return one response of the first teacher per user text."""
        return self.first.rewrite(texts, step, attempt)

"""What the teacher is asked in a round of questions, and what has been heard of it so far."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from data.question import Question
from zppo_mm.experience import Rollout
from zppo_mm.interruption import StopRequested
from zppo_mm.teacher.teacher import Answers, Teacher, TeacherLostError

logger = logging.getLogger(__name__)


class PendingAnswers:
    """Asks every question once, in its original form. Every rank holds one and calls it alike.

    Args:
        teacher: Who is asked; `None` is never asked anything.
        step: Rollout step.
        known: Ids of questions that are not asked again.
    """

    def __init__(self, teacher: Teacher | None, step: int, known: Iterable[str] = ()) -> None:
        self._teacher = teacher
        self._step = step
        self._known = set(known)
        self._asked: list[tuple[frozenset[str], Answers]] = []
        self._heard: dict[int, Mapping[str, tuple[Rollout, ...]]] = {}
        self._unwanted: set[str] = set()

    def ask(self, questions: Sequence[Question]) -> None:
        """Ask what was not asked before."""
        fresh = {question.id: question for question in questions if question.id not in self._known}
        self._known |= fresh.keys()
        if self._teacher is not None and fresh:
            self._asked.append(
                (frozenset(fresh), self._teacher.submit(list(fresh.values()), self._step))
            )

    def want_only(self, question_ids: Collection[str]) -> int:
        """Leave out of all that is told here what was asked about other questions; returns how many
        these are.
        """
        self._unwanted = {question_id for ids, _ in self._asked for question_id in ids}.difference(
            question_ids
        )
        return len(self._unwanted)

    @property
    def answers(self) -> dict[str, tuple[Rollout, ...]]:
        """What was heard so far: rollouts by question id, in the order of asking."""
        heard = (item for place in sorted(self._heard) for item in self._heard[place].items())
        return {
            question_id: rollouts
            for question_id, rollouts in heard
            if question_id not in self._unwanted
        }

    @property
    def awaited(self) -> frozenset[str]:
        """Ids of questions that were asked and whose answers were not heard."""
        return frozenset[str]().union(*(ids for _, ids, _ in self._unheard())) - self._unwanted

    def look(self) -> None:
        """Hear the answers that are there, without waiting."""
        for place, _, answers in self._unheard():
            if answers.is_ready():
                self._heard[place] = answers.wait()

    def hear(self, question_id: str) -> None:
        """Wait for the answer to a question, and for those that were asked for together with it.

        Raises:
            TeacherLostError: On every rank, if the teacher does not answer and the run is not to go
                on without it.
        """
        for place, ids, answers in self._unheard():
            if question_id in ids:
                self._heard[place] = answers.wait()

    def hear_all(self) -> None:
        """Wait for all answers.

        Raises:
            TeacherLostError: As `hear`.
        """
        for place, _, answers in self._unheard():
            self._heard[place] = answers.wait()

    def hear_or_lose(self) -> list[TeacherLostError]:
        """Wait for all answers; what is lost counts as not answered, and the teacher's errors come
        back.
        """
        errors = []
        for place, ids, answers in self._unheard():
            try:
                self._heard[place] = answers.wait()
            except (TeacherLostError, StopRequested) as error:
                self._heard[place] = dict.fromkeys(sorted(ids), ())
                if isinstance(error, TeacherLostError):
                    errors.append(error)
                else:
                    logger.warning(
                        "step %d: the run ends without the teacher's answers to %d questions",
                        self._step,
                        len(ids),
                    )
        return errors

    def _unheard(self) -> list[tuple[int, frozenset[str], Answers]]:
        """Return what was asked and not heard, with its place, in the order of asking."""
        return [
            (place, ids, answers)
            for place, (ids, answers) in enumerate(self._asked)
            if place not in self._heard
        ]

    @property
    def seconds(self) -> float | None:
        """From asking to the last answer that was heard; `None` if nothing was."""
        return max((self._asked[place][1].seconds for place in self._heard), default=None)

"""The teacher's answers to the questions of one sampling round, collected as they arrive."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from data.question import Question
from zppo_mm.experience import Rollout
from zppo_mm.interruption import StopRequested
from zppo_mm.teacher.teacher import Answers, Teacher, TeacherLostError

logger = logging.getLogger(__name__)


class PendingAnswers:
    """Submits every question once, in its original form. Every rank holds one and calls it alike.

    Args:
        teacher: Answers the questions; with `None` nothing is submitted.
        step: Rollout step.
        known: Ids of questions that are not submitted again.
    """

    def __init__(self, teacher: Teacher | None, step: int, known: Iterable[str] = ()) -> None:
        self._teacher = teacher
        self._step = step
        self._known = set(known)
        self._requests: list[tuple[frozenset[str], Answers]] = []
        self._replies: dict[int, Mapping[str, tuple[Rollout, ...]]] = {}

    def submit(self, questions: Sequence[Question]) -> None:
        """Ask the teacher about the questions that were not submitted before."""
        fresh = {question.id: question for question in questions if question.id not in self._known}
        self._known |= fresh.keys()
        if self._teacher is not None and fresh:
            self._requests.append(
                (frozenset(fresh), self._teacher.submit(list(fresh.values()), self._step))
            )

    @property
    def answers(self) -> dict[str, tuple[Rollout, ...]]:
        """Answers received so far: rollouts by question id, in the order of submission."""
        return {
            question_id: rollouts
            for index in sorted(self._replies)
            for question_id, rollouts in self._replies[index].items()
        }

    @property
    def awaited(self) -> frozenset[str]:
        """Ids of submitted questions without a reply."""
        return frozenset[str]().union(*(ids for _, ids, _ in self._outstanding()))

    @property
    def seconds(self) -> float | None:
        """Time from a submission to its reply, the longest of all; `None` without a reply."""
        return max((self._requests[index][1].seconds for index in self._replies), default=None)

    def poll(self) -> None:
        """Take the replies that have arrived, without waiting."""
        for index, _, answers in self._outstanding():
            if answers.is_ready():
                self._replies[index] = answers.wait()

    def wait_for(self, question_ids: Collection[str]) -> None:
        """Wait for the answers to some questions, and to those submitted together with them.

        Raises:
            TeacherLostError: On every rank, if the teacher does not answer and the run is not to go
                on without it.
        """
        for index, ids, answers in self._outstanding():
            if not ids.isdisjoint(question_ids):
                self._replies[index] = answers.wait()

    def drain(self) -> list[TeacherLostError]:
        """Wait for all answers; a lost one counts as not answered, and its error is returned."""
        errors = []
        for index, ids, answers in self._outstanding():
            try:
                self._replies[index] = answers.wait()
            except (TeacherLostError, StopRequested) as error:
                self._replies[index] = dict.fromkeys(sorted(ids), ())
                if isinstance(error, TeacherLostError):
                    errors.append(error)
                else:
                    logger.warning(
                        "step %d: the run ends without the teacher's answers to %d questions",
                        self._step,
                        len(ids),
                    )
        return errors

    def _outstanding(self) -> list[tuple[int, frozenset[str], Answers]]:
        """Return requests without a reply, with their index, in the order of submission."""
        return [
            (index, ids, answers)
            for index, (ids, answers) in enumerate(self._requests)
            if index not in self._replies
        ]

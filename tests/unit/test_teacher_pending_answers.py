"""Pending answers: submitted once, polled without waiting, waited for by name, drained at the
end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data.question import Question
from tests.support.zone_builders import question, rollout
from zppo_mm.experience import Rollout
from zppo_mm.teacher.pending_answers import PendingAnswers
from zppo_mm.teacher.teacher import TeacherLostError


@dataclass
class Reply:
    """Answers to one request; the test says when they have arrived."""

    ids: list[str]
    seconds: float
    has_arrived: bool = False
    num_waits: int = 0

    def is_ready(self) -> bool:
        return self.has_arrived

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        self.num_waits += 1
        return {each: (rollout(f"about {each}", "42", 1.0),) for each in self.ids}


@dataclass
class SlowTeacher:
    replies: list[Reply] = field(default_factory=list)

    def submit(self, questions: Sequence[Question], step: int) -> Reply:
        self.replies.append(Reply([each.id for each in questions], seconds=1.0 + len(self.replies)))
        return self.replies[-1]

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        raise AssertionError(texts)


def questions(names: str) -> list[Question]:
    return [question(name) for name in names]


def test_a_question_is_submitted_once_and_known_ones_never() -> None:
    teacher = SlowTeacher()
    pending = PendingAnswers(teacher, 3, known={"k"})
    for names in ("aba", "bck", "kc"):
        pending.submit(questions(names))
    assert [reply.ids for reply in teacher.replies] == [["a", "b"], ["c"]]
    assert pending.awaited == {"a", "b", "c"}


def test_poll_takes_what_has_arrived_and_wait_for_waits_for_what_is_named() -> None:
    teacher = SlowTeacher()
    pending = PendingAnswers(teacher, 3)
    for names in ("ab", "c", "d"):
        pending.submit(questions(names))
    first, second, third = teacher.replies
    second.has_arrived = True
    pending.poll()
    assert (list(pending.answers), pending.awaited) == (["c"], {"a", "b", "d"})
    pending.wait_for(["b"])
    # In the order of submission.
    assert (list(pending.answers), pending.awaited) == (["a", "b", "c"], {"d"})
    assert pending.seconds == 2.0
    pending.wait_for(pending.awaited)
    pending.poll()
    assert pending.awaited == frozenset()
    assert [reply.num_waits for reply in (first, second, third)] == [1, 1, 1]
    assert pending.seconds == 3.0


def test_drain_counts_lost_answers_as_not_answered_and_returns_their_errors() -> None:
    class LostReply(Reply):
        def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
            raise TeacherLostError("gone")

    class UnreliableTeacher(SlowTeacher):
        def submit(self, questions: Sequence[Question], step: int) -> Reply:
            reply = super().submit(questions, step)
            return LostReply(reply.ids, 0.0) if "b" in reply.ids else reply

    pending = PendingAnswers(UnreliableTeacher(), 3)
    for names in ("a", "cb", "d"):
        pending.submit(questions(names))
    (error,) = pending.drain()
    assert str(error) == "gone"
    assert {name: len(rollouts) for name, rollouts in pending.answers.items()} == {
        "a": 1,
        "b": 0,
        "c": 0,
        "d": 1,
    }
    assert pending.awaited == frozenset()
    assert pending.drain() == []


def test_without_a_teacher_nothing_is_submitted() -> None:
    pending = PendingAnswers(None, 1)
    pending.submit(questions("ab"))
    pending.poll()
    pending.wait_for("ab")
    assert (pending.answers, pending.awaited, pending.seconds) == ({}, frozenset(), None)

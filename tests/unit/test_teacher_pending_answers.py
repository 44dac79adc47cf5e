"""What is asked once, what is heard without waiting, and what is waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data.question import Question
from tests.unit.zone_builders import question, rollout
from zppo_mm.experience import Rollout
from zppo_mm.teacher.pending_answers import PendingAnswers
from zppo_mm.teacher.teacher import TeacherLostError


@dataclass
class Letter:
    """Answers to one lot of questions, there when the test says so."""

    ids: list[str]
    seconds: float
    is_there: bool = False
    num_waits: int = 0

    def is_ready(self) -> bool:
        return self.is_there

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        self.num_waits += 1
        return {each: (rollout(f"about {each}", "42", 1.0),) for each in self.ids}


@dataclass
class Correspondent:
    letters: list[Letter] = field(default_factory=list)

    def submit(self, questions: Sequence[Question], step: int) -> Letter:
        self.letters.append(
            Letter([each.id for each in questions], seconds=1.0 + len(self.letters))
        )
        return self.letters[-1]

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        raise AssertionError(texts)


def questions(names: str) -> list[Question]:
    return [question(name) for name in names]


def test_a_question_is_asked_once_and_those_known_before_never() -> None:
    teacher = Correspondent()
    pending = PendingAnswers(teacher, 3, known={"k"})
    for names in ("aba", "bck", "kc"):
        pending.ask(questions(names))
    assert [letter.ids for letter in teacher.letters] == [["a", "b"], ["c"]]
    assert pending.awaited == {"a", "b", "c"}


def test_looking_hears_what_is_there_and_hearing_waits_for_what_is_named() -> None:
    teacher = Correspondent()
    pending = PendingAnswers(teacher, 3)
    for names in ("ab", "c", "d"):
        pending.ask(questions(names))
    first, second, third = teacher.letters
    second.is_there = True
    pending.look()
    assert (list(pending.answers), pending.awaited) == (["c"], {"a", "b", "d"})
    pending.hear("b")
    assert (list(pending.answers), pending.awaited) == (
        ["a", "b", "c"],
        {"d"},
    )  # in the order of asking
    assert pending.seconds == 2.0
    pending.hear_all()
    pending.look()
    assert pending.awaited == frozenset()
    assert [letter.num_waits for letter in (first, second, third)] == [1, 1, 1]
    assert pending.seconds == 3.0


def test_unwanted_answers_are_neither_told_nor_awaited_but_heard() -> None:
    teacher = Correspondent()
    pending = PendingAnswers(teacher, 3)
    for names in ("ab", "cd", "e"):
        pending.ask(questions(names))
    assert pending.want_only({"a", "e"}) == 3
    assert pending.awaited == {"a", "e"}
    pending.hear_all()
    assert list(pending.answers) == ["a", "e"]
    assert [letter.num_waits for letter in teacher.letters] == [1, 1, 1]


def test_what_is_lost_counts_as_not_answered_and_the_rest_is_heard() -> None:
    class Lost(Letter):
        def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
            raise TeacherLostError("gone")

    class Unreliable(Correspondent):
        def submit(self, questions: Sequence[Question], step: int) -> Letter:
            letter = super().submit(questions, step)
            return Lost(letter.ids, 0.0) if "b" in letter.ids else letter

    pending = PendingAnswers(Unreliable(), 3)
    for names in ("a", "cb", "d"):
        pending.ask(questions(names))
    (error,) = pending.hear_or_lose()
    assert str(error) == "gone"
    assert {name: len(rollouts) for name, rollouts in pending.answers.items()} == {
        "a": 1,
        "b": 0,
        "c": 0,
        "d": 1,
    }
    assert pending.awaited == frozenset()
    assert pending.hear_or_lose() == []


def test_without_a_teacher_nothing_is_asked() -> None:
    pending = PendingAnswers(None, 1)
    pending.ask(questions("ab"))
    pending.look()
    pending.hear_all()
    assert (pending.answers, pending.awaited, pending.seconds) == ({}, frozenset(), None)

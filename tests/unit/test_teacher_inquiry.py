"""What is asked once, what is heard without waiting, and what is waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data.question import Question
from tests.unit.zone_builders import question, rollout
from zppo_mm.experience import Rollout
from zppo_mm.teacher.inquiry import Inquiry
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

    def ask(self, questions: Sequence[Question], step: int) -> Letter:
        self.letters.append(Letter([each.id for each in questions], seconds=1.0 + len(self.letters)))
        return self.letters[-1]

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        raise AssertionError(texts)


def questions(names: str) -> list[Question]:
    return [question(name) for name in names]


def test_a_question_is_asked_once_and_those_known_before_never() -> None:
    teacher = Correspondent()
    inquiry = Inquiry(teacher, 3, known={"k"})
    for names in ("aba", "bck", "kc"):
        inquiry.ask(questions(names))
    assert [letter.ids for letter in teacher.letters] == [["a", "b"], ["c"]]
    assert inquiry.awaited == {"a", "b", "c"}


def test_looking_hears_what_is_there_and_hearing_waits_for_what_is_named() -> None:
    teacher = Correspondent()
    inquiry = Inquiry(teacher, 3)
    for names in ("ab", "c", "d"):
        inquiry.ask(questions(names))
    first, second, third = teacher.letters
    second.is_there = True
    inquiry.look()
    assert (list(inquiry.answers), inquiry.awaited) == (["c"], {"a", "b", "d"})
    inquiry.hear("b")
    assert (list(inquiry.answers), inquiry.awaited) == (["a", "b", "c"], {"d"})  # in the order of asking
    assert inquiry.seconds == 2.0
    inquiry.hear_all()
    inquiry.look()
    assert inquiry.awaited == frozenset()
    assert [letter.num_waits for letter in (first, second, third)] == [1, 1, 1]
    assert inquiry.seconds == 3.0


def test_unwanted_answers_are_neither_told_nor_awaited_but_heard() -> None:
    teacher = Correspondent()
    inquiry = Inquiry(teacher, 3)
    for names in ("ab", "cd", "e"):
        inquiry.ask(questions(names))
    assert inquiry.want_only({"a", "e"}) == 3
    assert inquiry.awaited == {"a", "e"}
    inquiry.hear_all()
    assert list(inquiry.answers) == ["a", "e"]
    assert [letter.num_waits for letter in teacher.letters] == [1, 1, 1]


def test_what_is_lost_counts_as_not_answered_and_the_rest_is_heard() -> None:
    class Lost(Letter):
        def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
            raise TeacherLostError("gone")

    class Unreliable(Correspondent):
        def ask(self, questions: Sequence[Question], step: int) -> Letter:
            letter = super().ask(questions, step)
            return Lost(letter.ids, 0.0) if "b" in letter.ids else letter

    inquiry = Inquiry(Unreliable(), 3)
    for names in ("a", "cb", "d"):
        inquiry.ask(questions(names))
    (error,) = inquiry.hear_or_lose()
    assert str(error) == "gone"
    assert {name: len(rollouts) for name, rollouts in inquiry.answers.items()} == {"a": 1, "b": 0, "c": 0, "d": 1}
    assert inquiry.awaited == frozenset()
    assert inquiry.hear_or_lose() == []


def test_without_a_teacher_nothing_is_asked() -> None:
    inquiry = Inquiry(None, 1)
    inquiry.ask(questions("ab"))
    inquiry.look()
    inquiry.hear_all()
    assert (inquiry.answers, inquiry.awaited, inquiry.seconds) == ({}, frozenset(), None)

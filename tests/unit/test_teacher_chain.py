"""Several teachers: who is asked what, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from data.question import Question
from tests.support.zone_builders import question, rollout
from zppo_mm.experience import Rollout
from zppo_mm.teacher.chain import TeacherChain


@dataclass
class Ready:
    rollouts: Mapping[str, tuple[Rollout, ...]]
    seconds: float = 1.5
    is_there: bool = True

    def is_ready(self) -> bool:
        return self.is_there

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        return self.rollouts


@dataclass
class Knows:
    """A teacher that answers every question twice, and right if it knows it."""

    name: str
    known: set[str]
    asked: list[list[str]] = field(default_factory=list)

    def submit(self, questions: Sequence[Question], step: int) -> Ready:
        self.asked.append([each.id for each in questions])
        return Ready(
            {
                q.id: tuple(
                    rollout(self.name, "x", float(q.id in self.known and i == 1)) for i in range(2)
                )
                for q in questions
            }
        )

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        return [f"{self.name}: {text}" for text in texts]


@dataclass
class Slow(Knows):
    """One whose answers are there only when the test says so."""

    answers: list[Ready] = field(default_factory=list)

    def submit(self, questions: Sequence[Question], step: int) -> Ready:
        self.answers.append(super().submit(questions, step))
        self.answers[-1].is_there = False
        return self.answers[-1]


def test_each_teacher_is_asked_what_all_before_it_did_not_solve() -> None:
    first, second, third = (
        Knows("first", {"a"}),
        Knows("second", {"b"}),
        Knows("third", {"a", "b", "c"}),
    )
    chain = TeacherChain([first, second, third])
    asked = chain.submit([question(name) for name in "abcd"], 1)
    assert (second.asked, third.asked) == ([], [])  # only when the first has answered
    answers = asked.wait()
    assert first.asked == [["a", "b", "c", "d"]]
    assert second.asked == [["b", "c", "d"]]
    assert third.asked == [["c", "d"]]
    assert {name: [each.text for each in rollouts] for name, rollouts in answers.items()} == {
        "a": ["first"] * 2,
        "b": ["first"] * 2 + ["second"] * 2,
        "c": ["first"] * 2 + ["second"] * 2 + ["third"] * 2,
        "d": ["first"] * 2 + ["second"] * 2 + ["third"] * 2,
    }
    assert chain.num_passed_on == 3 + 2
    assert asked.seconds == pytest.approx(4.5)


def test_the_next_teacher_is_asked_when_one_is_seen_to_have_answered() -> None:
    first, second, third = Slow("first", {"a"}), Slow("second", {"b"}), Knows("third", set())
    asked = TeacherChain([first, second, third]).submit([question(name) for name in "abc"], 1)
    assert not asked.is_ready()
    assert second.asked == []
    first.answers[0].is_there = True
    assert not asked.is_ready()
    assert not asked.is_ready()  # looking twice asks nobody twice
    assert (second.asked, third.asked) == ([["b", "c"]], [])
    second.answers[0].is_there = True
    assert asked.is_ready()
    assert third.asked == [["c"]]
    assert {name: len(rollouts) for name, rollouts in asked.wait().items()} == {
        "a": 2,
        "b": 4,
        "c": 6,
    }
    assert asked.seconds == pytest.approx(4.5)


def test_no_further_teacher_is_asked_when_all_is_solved_and_the_first_rewrites() -> None:
    first, second = Knows("first", {"a", "b"}), Knows("second", set())
    chain = TeacherChain([first, second])
    chain.submit([question("a"), question("b")], 1).wait()
    assert second.asked == []
    assert chain.rewrite(["t"], 1, 0) == ["first: t"]


def test_a_question_without_any_answer_is_passed_on() -> None:
    class Silent(Knows):
        def submit(self, questions: Sequence[Question], step: int) -> Ready:
            return Ready({each.id: () for each in questions})

    second = Knows("second", {"a"})
    answers = TeacherChain([Silent("silent", set()), second]).submit([question("a")], 1).wait()
    assert [each.text for each in answers["a"]] == ["second", "second"]

"""A step with fakes of its parts: Algorithm 1, what a baseline leaves out, and what a step that is
dropped leaves as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.health import SampleHealth
from data.media.opening import Frames
from data.question import MediaRef, Question
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.shard_samples import sample
from tests.support.tiny_folder import build_folder
from tests.support.zone_builders import question, rollout
from zppo_mm.config.schema import DistillConfig, ZoneConfig
from zppo_mm.experience import Advantages, Group, Prompt, PromptInstance, Rollout
from zppo_mm.observability.metrics import StepMetrics
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.stages.stages import Stages
from zppo_mm.step import run_step
from zppo_mm.teacher.teacher import CompressedTrace, TeacherLostError, Trace
from zppo_mm.zone.plain_schedule import PlainSchedule
from zppo_mm.zone.prompts import load_templates
from zppo_mm.zone.reformulate import Reformulator
from zppo_mm.zone.replay import ReplayBuffer
from zppo_mm.zone.selection import Selection

NUM_NEW = 4
NUM_ROLLOUTS = 4
TEMPLATES = load_templates()


@dataclass
class FakeFeed:
    """New questions a, b, c, d, then e, f, g, h and so on."""

    events: list[str]
    num_taken: int = 0

    def take(self, num_questions: int) -> list[Question]:
        names = [chr(ord("a") + self.num_taken + index) for index in range(num_questions)]
        self.num_taken += num_questions
        self.events.append(f"take {' '.join(names)}")
        return [question(name) for name in names]


@dataclass
class FakeSampler:
    """The student: it solves as many of four rollouts as `num_solved` says of a question."""

    events: list[str]
    num_solved: dict[str, int]
    failed: dict[str, str] = field(default_factory=dict)
    num_preemptions: int = 0

    def sample(
        self,
        instances: Sequence[PromptInstance],
        params: SamplingParams,
        num_rollouts: int,
        step: int,
    ) -> list[Group]:
        self.events.append(
            "sample " + " ".join(f"{each.kind}:{each.question.id}" for each in instances)
        )
        return [self.group(each, num_rollouts) for each in instances]

    def group(self, instance: PromptInstance, num_rollouts: int) -> Group:
        num_solved = self.num_solved.get(instance.question.id, num_rollouts)
        prompt = Prompt(instance.text, np.arange(3), np.zeros((3, 3), np.int64), 3)
        rollouts = tuple(
            rollout(f"try {index}", "42", 1.0)
            if index < num_solved
            else rollout(f"try {index}", str(index), 0.0)
            for index in range(num_rollouts)
        )
        return Group(instance, prompt, rollouts)


@dataclass
class FakeAnswers:
    """Correct answers, there when `has_arrived` says so."""

    events: list[str]
    ids: list[str]
    has_arrived: bool
    is_lost: bool
    seconds: float = 2.0

    def is_ready(self) -> bool:
        return self.has_arrived

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        self.events.append(f"answered {' '.join(self.ids)}")
        if self.is_lost:
            raise TeacherLostError("the teacher is gone")
        return {name: (rollout(f"teacher on {name}", "42", 1.0),) for name in self.ids}


@dataclass
class FakeTeacher:
    events: list[str]
    is_fast: bool = True
    is_lost: bool = False

    def submit(self, questions: Sequence[Question], step: int) -> FakeAnswers:
        ids = [each.id for each in questions]
        self.events.append(f"ask {' '.join(ids)}")
        return FakeAnswers(self.events, ids, self.is_fast, self.is_lost)

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        raise AssertionError(texts)


@dataclass
class FakeLearner:
    events: list[str]
    advantages: Advantages = field(default_factory=dict)

    def learn(
        self, groups: Sequence[Group], advantages: Advantages, step: int, metrics: StepMetrics
    ) -> dict[str, tuple[int, ...]]:
        self.events.append(
            "learn " + " ".join(f"{each.kind}:{each.question.id}" for each in groups)
        )
        self.advantages = advantages
        return {group.uid: (0,) * len(group.rollouts) for group in groups}


class WholeCompressor:
    """Shows every response as it is."""

    def compress(self, traces: Sequence[Trace], step: int) -> list[CompressedTrace]:
        return [CompressedTrace(trace.text, "cut", 0) for trace in traces]


@dataclass
class Fakes:
    """The parts of a step; all write to one list of events."""

    stages: Stages
    events: list[str]
    teacher: FakeTeacher
    learner: FakeLearner
    sampler: FakeSampler

    def step(self, number: int) -> Any:
        self.events.clear()
        return run_step(self.stages, number)


def make_fakes(num_solved: Mapping[str, int], with_teacher: bool = True, **zone: Any) -> Fakes:
    events: list[str] = []
    section = ZoneConfig(**{"rho_aug": 0.5, "rho_replay": 0.5, **zone})
    teacher, learner = FakeTeacher(events), FakeLearner(events)
    sampler = FakeSampler(events, dict(num_solved))

    def adopt(*arguments: object) -> list[Group]:
        raise AssertionError(arguments)

    stages = Stages(
        seed=0,
        num_new_questions=NUM_NEW,
        num_rollouts=NUM_ROLLOUTS,
        advantage_normalization="none",
        zone=section,
        distill=DistillConfig(),
        feed=FakeFeed(events),
        replay=ReplayBuffer(8),
        sampler=sampler,
        sampling=SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=()),
        teacher=teacher if with_teacher else None,
        reformulator=Reformulator(
            TEMPLATES,
            section,
            0,
            WholeCompressor(),
            student_ids=lambda rollout: rollout.response_ids.tolist(),
        ),
        selection=Selection(
            section,
            DistillConfig(),
            0,
            student_ids=lambda rollout: rollout.response_ids,
            adopt=adopt,
            plain_text=TEMPLATES.plain_text,
        ),
        learner=learner,
        schedule=PlainSchedule(seed=0),
    )
    return Fakes(stages, events, teacher, learner, sampler)


def test_a_step_is_algorithm_1() -> None:
    fakes = make_fakes({"b": 1, "d": 3})  # mean accuracies 0.25 and 0.75 with tau = 0.5
    record = fakes.step(1)
    assert fakes.events == [
        "take a b c d",
        "sample new:a new:b new:c new:d",
        "ask b",
        "answered b",
        "sample bcq:b ncq:b",  # rho_aug leaves room for 0.5 * 4 prompts
        "learn new:a new:b new:c new:d bcq:b ncq:b",
    ]
    bcq = next(group for group in record.groups if group.kind == "bcq")
    assert {(each.source, each.correct) for each in bcq.instance.candidates} == {
        ("teacher", True),
        ("student", False),
    }
    # One right of four: 1 - 1/4 and 0 - 1/4.
    assert fakes.learner.advantages["1/new/1/b"].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert (record.buffer.admitted, record.buffer.content) == (("b",), ("b",))
    assert record.teacher_rewards == {"b": (1.0,)}
    assert record.minibatches.keys() == record.advantages.keys() == {g.uid for g in record.groups}
    values = record.metrics.values()
    assert (values["batch/hard"], values["batch/bcq_eligible"], values["buffer/size"]) == (1, 1, 1)


def test_hard_questions_come_back_until_they_are_mastered() -> None:
    fakes = make_fakes({"b": 1})
    fakes.step(1)
    fakes.sampler.num_solved["b"] = NUM_ROLLOUTS
    record = fakes.step(2)
    assert fakes.events == [
        "take e f g h",
        "sample new:e new:f new:g new:h replayed:b",
        "learn new:e new:f new:g new:h replayed:b",
    ]
    assert (record.buffer.graduated, record.buffer.content) == (("b",), ())


def test_grpo_asks_no_teacher_reformulates_nothing_and_keeps_no_buffer() -> None:
    fakes = make_fakes({"b": 0}, with_teacher=False, bcq=False, ncq=False, replay=False)
    record = fakes.step(1)
    assert fakes.events == [
        "take a b c d",
        "sample new:a new:b new:c new:d",
        "learn new:a new:b new:c new:d",
    ]
    assert (record.teacher_rewards, record.buffer.content) == ({}, ())


def test_ncq_prompts_are_sampled_while_the_teacher_still_answers() -> None:
    fakes = make_fakes({"b": 0, "c": 0}, rho_aug=1.0)
    fakes.teacher.is_fast = False
    fakes.step(1)
    assert fakes.events[2:] == [
        "ask b c",
        # Both questions tie, so a draw puts c first. No answer can take these prompts away.
        "sample ncq:c ncq:b",
        "answered b c",
        "sample bcq:c bcq:b",
        "learn new:a new:b new:c new:d bcq:c ncq:c bcq:b ncq:b",
    ]


def test_answers_that_change_no_prompt_are_waited_for_after_the_update() -> None:
    fakes = make_fakes({"b": 0}, bcq=False)
    fakes.teacher.is_fast = False
    record = fakes.step(1)
    assert fakes.events[-2:] == ["learn new:a new:b new:c new:d ncq:b", "answered b"]
    assert record.teacher_rewards == {"b": (1.0,)}
    assert record.metrics.values()["teacher/answer_seconds"] == 2.0


HARD = {"a": 0, "b": 1, "c": 1, "d": 0}
"""All four are hard; rho_aug leaves the two harder ones."""


def asked(fakes: Fakes) -> list[str]:
    return [event for event in fakes.events if event.startswith(("ask", "sample new"))]


def test_prefix_asks_the_teacher_only_about_what_the_pre_cap_keeps() -> None:
    fakes = make_fakes(HARD, bcq=False, ncq=False, prefix=True)
    record = fakes.step(1)
    assert asked(fakes) == ["sample new:a new:b new:c new:d", "ask d a"]
    assert fakes.events[-1] == "learn new:a new:b new:c new:d prefix:d prefix:a"
    assert set(record.teacher_rewards) == {"a", "d"}


def test_it_is_asked_after_every_wave_about_what_is_certain_to_be_kept() -> None:
    fakes = make_fakes(HARD, bcq=False, ncq=False, prefix=True)
    fakes.teacher.is_fast = False
    stages = dataclasses.replace(fakes.stages, schedule=PlainSchedule(seed=0, wave_size=1))
    run_step(stages, 1)
    # Harder questions may come after c. None can after d, whose accuracy is 0 and which the draw
    # puts before those to come. After b there is still a.
    assert asked(fakes) == [
        "sample new:c",
        "sample new:d",
        "ask d",
        "sample new:b",
        "sample new:a",
        "ask a",
    ]
    assert fakes.events[-1] == "learn new:a new:b new:c new:d prefix:d prefix:a"


def test_beside_a_method_that_asks_about_all_hard_questions_all_are_asked() -> None:
    for other in ("bcq", "inject"):
        fakes = make_fakes(HARD, **{"bcq": False, "ncq": False, "prefix": True, other: True})
        fakes.step(1)
        assert asked(fakes)[1:] == ["ask a b c d"]


def test_a_later_round_asks_about_its_own_questions() -> None:
    fakes = make_fakes({}, bcq=False, ncq=False, prefix=True, max_sampling_rounds=2)
    fakes.sampler.num_solved |= {"a": 0, "b": 0, "c": 0, "f": 0, "g": 1}
    fakes.step(1)
    first, second = [event for event in fakes.events if event.startswith("ask")]
    assert len(first.split()) == 3  # of three hard questions two are kept
    assert second == "ask f g"


def test_a_teacher_lost_before_the_update_leaves_weights_and_buffer_as_they_were() -> None:
    fakes = make_fakes({"b": 0})
    fakes.teacher.is_lost = True
    with pytest.raises(TeacherLostError):
        fakes.step(1)
    assert not any(event.startswith("learn") for event in fakes.events)
    assert fakes.stages.replay.content() == []


def test_a_teacher_lost_after_the_update_is_recorded_with_the_complete_step() -> None:
    fakes = make_fakes({"b": 0}, bcq=False)
    fakes.teacher.is_fast, fakes.teacher.is_lost = False, True
    record = fakes.step(1)
    assert str(record.teacher_lost) == "the teacher is gone"
    assert (record.buffer.content, record.teacher_rewards) == (("b",), {"b": ()})


def test_dynamic_sampling_takes_another_round_and_leaves_trivial_groups_out() -> None:
    # Of every four questions one has rewards that differ, until four have.
    fakes = make_fakes(
        {"a": 2, "e": 2, "i": 2}, with_teacher=False, bcq=False, ncq=False, max_sampling_rounds=3
    )
    record = fakes.step(1)
    assert [event for event in fakes.events if event.startswith("take")] == [
        "take a b c d",
        "take e f g h",
        "take i j k l",
    ]
    assert fakes.events[-1] == "learn new:a new:e new:i"
    assert record.metrics.values()["batch/sampling_rounds"] == 3
    assert record.metrics.values()["batch/dropped_questions"] == 9


def test_two_questions_with_one_id_stop_the_step(tmp_path: Path) -> None:
    def no_media(reference: MediaRef) -> Frames:
        raise AssertionError(reference)

    write_shards(tmp_path / "first", [sample(1, source="first")])
    write_shards(tmp_path / "second", [sample(1, source="second", question="Another one?")])
    build_folder(tmp_path)
    health = SampleHealth()
    stream = QuestionStream(
        [(ShardFolder(tmp_path / name), 1.0) for name in ("first", "second")], 0, health
    )
    feed = QuestionFeed(
        stream,
        PromptEncoder(tmp_path, no_media),
        health,
        SingleProcess(),
        plain_text=lambda question: question.text,
        max_prompt_tokens=100,
    )
    fakes = make_fakes({})
    named = (
        r"two different questions have the id 'q1', got '1 \+ 1 = \?' \(source 'first'\) and "
        r"'Another one\?' \(source 'second'\)"
    )
    with pytest.raises(DataError, match=named):
        run_step(dataclasses.replace(fakes.stages, feed=feed), 1)
    assert fakes.events == []

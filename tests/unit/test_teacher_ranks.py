"""The teacher on its own ranks, both worlds as threads of one process: requests, their order,
losses, last words, the store's content.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import TCPStore

from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.tiny_folder import build_folder
from zppo_mm.config.schema import ParallelConfig, RewardConfig, TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.parallel.groups import LostRankError
from zppo_mm.parallel.partition import divide_job
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.teacher.megatron_teacher import MegatronTeacher
from zppo_mm.teacher.rank_channel import CHUNK_BYTES, DONE, Channel, Judgements, Rewrites
from zppo_mm.teacher.rank_server import LeaveToStudent, TeacherServer
from zppo_mm.teacher.ranks_teacher import RanksTeacher, replies_of_ranks
from zppo_mm.teacher.teacher import TeacherLostError

pytestmark = pytest.mark.timeout(120)
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=40, stop_token_ids=(0,))
NUM_ROLLOUTS = 2
# Threads of one process answer in milliseconds; a loaded machine gets a wide margin.
SOON = 60.0


class CountingEngine:
    """Answers rollout i of any prompt with `\\boxed{i}`; a gate holds it up, and it notes what it
    was asked.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self.calls: list[tuple[int, float, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.trouble: Exception | None = None

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        self.calls.append((len(requests), sampling.temperature, sampling.max_new_tokens))
        assert self.gate.wait(SOON)
        if self.trouble is not None:
            raise self.trouble
        return [
            [self._generation(place) for place in range(request.num_rollouts)]
            for request in requests
        ]

    def _generation(self, place: int) -> Generation:
        ids = np.array(self._encoder.chat.tokenize([f"so </think> \\boxed{{{place}}}"]), np.int64)
        return Generation(ids, np.full(len(ids), -0.5, np.float32), "stop")


@dataclass
class Worlds:
    """A student's end and a teacher that can be started."""

    store: TCPStore
    encoder: PromptEncoder
    engine: CountingEngine
    verifier: Verifier
    silence_seconds: float = SOON
    words: list[str | Exception] = field(default_factory=list)

    def channel(self, own: str, other: str, beats: bool = True) -> Channel:
        return Channel(self.store, own, other, silence_seconds=self.silence_seconds, beats=beats)

    def student(self, channel: Channel, **config: Any) -> RanksTeacher:
        options = TeacherConfig(num_rollouts=NUM_ROLLOUTS, **{"max_wait_seconds": SOON, **config})
        return RanksTeacher(channel, options, SingleProcess(), self.verifier)

    def start_teacher(self, num_at_once: int = 100, beats: bool = True) -> threading.Thread:
        sampler = GroupSampler(self.engine, self.encoder, LeaveToStudent(), SingleProcess())
        channel = self.channel("teacher", "student", beats)
        no_network: Any = None  # the engine has none
        server = TeacherServer(
            channel,
            MegatronTeacher(
                no_network, sampler, SAMPLING, NUM_ROLLOUTS, lambda question: question.text
            ),
            SingleProcess(),
            judge_max_tokens=7,
            num_at_once=num_at_once,
            release_memory=self.encoder.forget_media,
        )

        def serve() -> None:
            try:
                self.words.append(server.serve())
            except Exception as error:
                self.words.append(error)
                channel.leave(f"rank 5: {type(error).__name__}: {error}")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Worlds]:
    def no_media(reference: MediaRef) -> Frames:
        raise AssertionError(reference)

    build_folder(tmp_path)
    encoder = PromptEncoder(tmp_path, no_media)
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=SOON))
    with Verifier() as verifier:
        yield Worlds(store, encoder, CountingEngine(encoder), verifier)


def questions(count: int) -> list[Question]:
    return [
        Question(f"q{index}", f"Question {index}?", (), str(index % 2), "math")
        for index in range(count)
    ]


def end(channel: Channel, teacher: threading.Thread) -> None:
    channel.leave()
    teacher.join(SOON)
    assert not teacher.is_alive()


def eventually(holds: Any) -> None:
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_come_graded_and_nothing_stays_in_the_store(worlds: Worlds) -> None:
    student = worlds.channel("student", "teacher")
    asking = worlds.student(student)
    teacher = worlds.start_teacher(num_at_once=2)
    asking.greet()
    eventually(lambda: not worlds.store.check(["finished/1"]))
    level = worlds.store.num_keys()
    for step in (1, 2, 3):
        pending = asking.submit(questions(5), step)
        answers = pending.wait()
        assert pending.seconds > 0
        assert list(answers) == [f"q{index}" for index in range(5)]
        for index, rollouts in enumerate(answers.values()):
            # Rollout i says i; even questions want 0, odd ones 1.
            assert [rollout.parsed for rollout in rollouts] == ["0", "1"]
            assert [rollout.reward for rollout in rollouts] == [1.0 - index % 2, float(index % 2)]
            assert {rollout.policy_version for rollout in rollouts} == {step}
        eventually(lambda: worlds.store.num_keys() == level)
    # Parts of two: 2 + 2 + 1 questions a step.
    assert [size for size, _, _ in worlds.engine.calls] == [2, 2, 1] * 3
    assert asking.counts == {"lost_rollouts": 0}
    end(student, teacher)
    assert worlds.words == [DONE]


def test_what_the_student_stands_still_for_comes_first_and_a_judge_replies_greedily(
    worlds: Worlds,
) -> None:
    student = worlds.channel("student", "teacher")
    asking = worlds.student(student)
    worlds.engine.gate.clear()
    teacher = worlds.start_teacher(num_at_once=1)
    pending = asking.submit(questions(3), 1)
    eventually(lambda: len(worlds.engine.calls) == 1)
    rewrites = student.request(Rewrites(("shorter, please",), 1, 0))
    judge = student.request(Judgements(("one", "two")))
    worlds.engine.gate.set()
    assert not pending.is_ready()
    pending.wait()
    assert student.reply(rewrites) == ["so </think> \\boxed{0}"]
    assert student.reply(judge) == ["\\boxed{0}"] * 2
    # One question, the rewrite, both of the judge's prompts at temperature 0 and without their
    # reasoning, the other two questions.
    assert worlds.engine.calls == [
        (1, 1.0, 40),
        (1, 1.0, 40),
        (2, 0.0, 7),
        (1, 1.0, 40),
        (1, 1.0, 40),
    ]
    end(student, teacher)


def test_the_judge_has_its_time_from_when_the_teacher_begins(worlds: Worlds) -> None:
    student = worlds.channel("student", "teacher")
    worlds.engine.gate.clear()
    teacher = worlds.start_teacher(num_at_once=1)
    worlds.student(student).submit(questions(1), 1)
    eventually(lambda: len(worlds.engine.calls) == 1)
    complete = replies_of_ranks(
        student, RewardConfig(judge_max_wait_seconds=2.0), queue_seconds=SOON
    )
    threading.Timer(4.0, worlds.engine.gate.set).start()  # one long answer: twice the judge's time
    assert complete(["one"]) == ["\\boxed{0}"]
    worlds.engine.gate.clear()
    started = time.monotonic()
    assert complete(["two"]) == [None]  # the teacher has begun, and takes too long for this
    assert time.monotonic() - started >= 2.0
    worlds.engine.gate.set()
    eventually(
        lambda: not worlds.store.check(["started/2"]) and not worlds.store.check(["started/3"])
    )
    end(student, teacher)


def test_messages_above_the_limit_of_the_store_pass(worlds: Worlds) -> None:
    student, teacher = (
        worlds.channel("student", "teacher", beats=False),
        worlds.channel("teacher", "student", beats=False),
    )
    level = worlds.store.num_keys()
    text = "0123456789" * (CHUNK_BYTES // 4)  # 2.5 chunks
    number = student.request(Rewrites((text,), 1, 0))
    assert worlds.store.num_keys() == level + 5  # the counter, three chunks and their number
    assert teacher.take_request(number) == Rewrites((text,), 1, 0)
    assert teacher.take_request(number + 1) is None
    teacher.answer(number, [text])
    assert not teacher.clear_if_finished(number)
    assert student.reply(number) == [text]
    student.finish(number)
    assert teacher.clear_if_finished(number)
    assert worlds.store.num_keys() == level + 1


def test_without_an_answer_in_time_the_run_stops_or_goes_on_as_it_is_told(worlds: Worlds) -> None:
    student = worlds.channel("student", "teacher")
    worlds.engine.gate.clear()
    teacher = worlds.start_teacher()
    with pytest.raises(
        TeacherLostError,
        match=(
            r"no answer to 3 questions of step 1, got none within teacher.max_wait_seconds=0.1, "
            r".*ncq_only"
        ),
    ):
        worlds.student(student, max_wait_seconds=0.1).submit(questions(3), 1).wait()
    hasty = worlds.student(student, max_wait_seconds=0.1, on_failure="ncq_only")
    assert hasty.submit(questions(3), 2).wait() == {"q0": (), "q1": (), "q2": ()}
    assert hasty.counts == {"lost_rollouts": 6}
    assert hasty.rewrite(["a", "b"], 2, 0) == [None, None]
    assert replies_of_ranks(student, RewardConfig(judge_max_wait_seconds=0.1), queue_seconds=0.2)(
        ["a", "b"]
    ) == [None, None]
    level = worlds.store.num_keys()
    worlds.engine.gate.set()
    patient = worlds.student(student)
    assert all(
        len(rollouts) == NUM_ROLLOUTS
        for rollouts in patient.submit(questions(3), 3).wait().values()
    )
    # Only the first request was under way when it was given up; none of the four is worked on after
    # that, or left in the store.
    assert [size for size, _, _ in worlds.engine.calls] == [3, 3]
    eventually(lambda: worlds.store.num_keys() < level - 4)
    end(student, teacher)


def test_the_error_of_a_teacher_rank_is_named_where_the_student_waits(worlds: Worlds) -> None:
    student = worlds.channel("student", "teacher")
    asking = worlds.student(student, on_failure="ncq_only")
    worlds.engine.trouble = RuntimeError("no memory left")
    teacher = worlds.start_teacher()
    named = (
        r"its ranks have ended, got 'rank 5: RuntimeError: no memory left', .*look at the last "
        r"ranks' output"
    )
    with pytest.raises(TeacherLostError, match=named):
        asking.submit(questions(1), 1).wait()
    with pytest.raises(TeacherLostError, match=named):
        asking.check()
    assert replies_of_ranks(student, RewardConfig(), queue_seconds=SOON)(["a"]) == [
        None
    ]  # soon, and neither right nor wrong
    end(student, teacher)


def test_a_dead_world_is_missed_by_the_other(worlds: Worlds) -> None:
    worlds.silence_seconds = 0.3
    dead = worlds.channel("student", "teacher", beats=False)
    with pytest.raises(
        TeacherLostError, match=r"got 'no sign of life within parallel\.timeout_minutes'"
    ):
        worlds.student(dead).greet()
    worlds.start_teacher(beats=False).join(SOON)
    (word,) = worlds.words
    assert isinstance(word, LostRankError)
    assert "the student's ranks are gone" in str(word)


def test_a_living_world_is_not_missed(worlds: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo_mm.teacher.rank_channel.BEAT_SECONDS", 0.05)
    worlds.silence_seconds = 1.0
    student = worlds.channel("student", "teacher")
    worlds.channel("teacher", "student")
    for _ in range(30):
        assert not student.is_other_silent()
        time.sleep(0.05)


def test_the_first_last_word_is_heard(worlds: Worlds) -> None:
    student, teacher = worlds.channel("student", "teacher"), worlds.channel("teacher", "student")
    assert teacher.last_word() is None
    student.leave("rank 1: ConfigError: the cause")
    student.leave("rank 0: LostRankError: what followed")
    assert teacher.last_word() == "rank 1: ConfigError: the cause"
    assert student.last_word() is None


def test_what_cannot_be_graded_is_left_out(worlds: Worlds) -> None:
    student = worlds.channel("student", "teacher")
    teacher = worlds.start_teacher()

    @dataclass(frozen=True)
    class Grade:
        parsed: str | None
        reward: float | None

    class Unsure:
        def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Grade]:
            return [Grade("?", None if text.endswith("{0}") else 1.0) for _, text in items]

    asking = RanksTeacher(
        student, TeacherConfig(num_rollouts=NUM_ROLLOUTS), SingleProcess(), Unsure()
    )
    answers = asking.submit(questions(2), 1).wait()
    assert [[rollout.text for rollout in rollouts] for rollouts in answers.values()] == [
        ["so </think> \\boxed{1}"]
    ] * 2
    end(student, teacher)


@pytest.mark.parametrize(
    ("num_ranks", "tensor", "message"),
    [
        (
            4,
            1,
            r"teacher.num_ranks: leaves the student none, got 4 of 4 process\(es\), expected fewer",
        ),
        (
            1,
            2,
            r"parallel: 3 process\(es\) cannot be split into tensor 2 x pipeline 1, .*multiple of "
            r"2; start 5 processes",
        ),
    ],
)
def test_a_job_that_cannot_be_divided_is_refused(
    num_ranks: int, tensor: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=message):
        divide_job(
            ParallelConfig(tensor_model_parallel_size=tensor), TeacherConfig(num_ranks=num_ranks)
        )

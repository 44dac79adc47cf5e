"""The teacher on ranks of its own, both partitions as threads of one process: requests, their
order, losses and exit reasons.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from torch.distributed import PrefixStore, TCPStore

from data.errors import MediaError
from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.tiny_folder import build_folder, template_with
from zppo_mm.config.schema import ParallelConfig, RewardConfig, TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.parallel.failures import RankFailureError
from zppo_mm.parallel.partition import DONE, JobPartition, PartitionLink, PartitionName, divide_job
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.teacher.served.chat_server import CONNECTION_CHECK_SECONDS, ChatServer
from zppo_mm.teacher.served.judge import greedy_replies
from zppo_mm.teacher.served.rank_server import NoGrader, RankServer
from zppo_mm.teacher.served.servers import Servers
from zppo_mm.teacher.served.teacher import ServedTeacher
from zppo_mm.teacher.served.teacher_ranks import SERVER, TeacherRanks
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
        self.paths: list[list[tuple[str | int, ...]]] = []
        self.prompts: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.trouble: Exception | None = None

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        self.calls.append((len(requests), sampling.temperature, sampling.max_new_tokens))
        self.paths.append([request.seed_path for request in requests])
        self.prompts += [request.prompt.text for request in requests]
        assert self.gate.wait(SOON)
        if self.trouble is not None:
            raise self.trouble
        return [
            [self.generation(number) for number in range(request.num_rollouts)]
            for request in requests
        ]

    def generation(self, number: int) -> Generation:
        ids = np.array(self._encoder.chat.tokenize([f"so </think> \\boxed{{{number}}}"]), np.int64)
        return Generation(ids, np.full(len(ids), -0.5, np.float32), "stop")


@dataclass
class Job:
    """Both partitions of a job, and a teacher that can be started."""

    store: TCPStore
    encoder: PromptEncoder
    without_thinking: PromptEncoder
    engine: CountingEngine
    verifier: Verifier
    server: ChatServer | None = None
    ended: list[str | Exception] = field(default_factory=list)
    pools: list[Servers] = field(default_factory=list)

    def partition(self, name: PartitionName) -> JobPartition:
        return JobPartition(name, 0, 1, 0 if name == "student" else 1, self.store)

    def link(self, name: PartitionName, timeout_seconds: float = SOON) -> PartitionLink:
        return PartitionLink(self.partition(name), timeout_seconds)

    def config(self, **options: Any) -> TeacherConfig:
        given = {"num_ranks": 1, "max_wait_seconds": SOON, "max_response_tokens": 40, **options}
        return TeacherConfig(num_rollouts=NUM_ROLLOUTS, **given)

    def pool(self, link: PartitionLink, batch_size: int = 100, **options: Any) -> Servers:
        ranks = TeacherRanks(link, SingleProcess())
        self.pools.append(ranks.open_pool(self.config(**options), batch_size * NUM_ROLLOUTS))
        return self.pools[-1]

    def student(self, link: PartitionLink, pool: Servers, **options: Any) -> ServedTeacher:
        return ServedTeacher(
            pool,
            self.config(**options),
            SingleProcess(),
            self.verifier,
            plain_text=lambda question: question.text,
            tokenize=lambda text: self.encoder.chat.tokenize([text]),
            seed=0,
            ranks=TeacherRanks(link, SingleProcess()),
        )

    def num_queued(self) -> int:
        return len(vars(self.server)["_pending"])

    def num_heartbeats(self) -> int:
        return self.store.add("teacher/heartbeats", 0)

    def start_teacher(self) -> threading.Thread:
        link, self.server = self.link("teacher"), ChatServer("127.0.0.1")
        server = self.server
        link.publish(SERVER, json.dumps({"url": server.url, "key": server.key}))
        sampler = GroupSampler(self.engine, self.encoder, NoGrader(), SingleProcess())
        without = GroupSampler(self.engine, self.without_thinking, NoGrader(), SingleProcess())
        ranks = RankServer(
            link, server, sampler, without, SAMPLING, SingleProcess(), self.encoder.forget_media
        )

        def serve() -> None:
            try:
                self.ended.append(ranks.serve())
            except Exception as error:
                self.ended.append(error)
                link.leave(f"rank 5: {type(error).__name__}: {error}")
            server.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    def no_media(reference: MediaRef) -> Frames:
        raise MediaError("unreadable", "no such file")

    build_folder(tmp_path, template=template_with("opened, can close"))
    encoder = PromptEncoder(tmp_path, no_media)
    without = PromptEncoder(tmp_path, no_media, chat_template_kwargs={"enable_thinking": False})
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=SOON))
    with Verifier() as verifier:
        job = Job(store, encoder, without, CountingEngine(encoder), verifier)
        yield job
        for pool in job.pools:
            pool.close()


def questions(count: int) -> list[Question]:
    return [
        Question(f"q{index}", f"Question {index}?", (), str(index % 2), "math")
        for index in range(count)
    ]


def end(link: PartitionLink, teacher: threading.Thread) -> None:
    link.leave()
    teacher.join(SOON)
    assert not teacher.is_alive()


def eventually(holds: Any) -> None:
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_come_graded_with_their_tokens_in_batches_of_a_fixed_size(job: Job) -> None:
    link, teacher = job.link("student"), job.start_teacher()
    pool = job.pool(link, batch_size=2)
    for step in (1, 2, 3):
        pending = job.student(link, pool).submit(questions(5), step)
        answers = pending.wait()
        assert pending.seconds > 0
        assert list(answers) == [f"q{index}" for index in range(5)]
        for index, rollouts in enumerate(answers.values()):
            # Rollout i says i; even questions want 0, odd ones 1.
            assert [rollout.parsed for rollout in rollouts] == ["0", "1"]
            assert [rollout.reward for rollout in rollouts] == [1.0 - index % 2, float(index % 2)]
            for number, rollout in enumerate(rollouts):
                sampled = job.engine.generation(number)
                assert rollout.response_ids.tolist() == sampled.response_ids.tolist()
                assert rollout.rollout_logprobs is not None
                assert rollout.rollout_logprobs.tolist() == sampled.rollout_logprobs.tolist()
                assert rollout.policy_version == step
    assert sorted(size for size, _, _ in job.engine.calls) == sorted([2, 2, 1] * 3)
    names = {path for paths in job.engine.paths for path in paths}
    assert names == {("rollout", f"{step}/teacher/q{i}") for step in (1, 2, 3) for i in range(5)}
    assert pool.counts["lost_rollouts"] == 0
    assert pool.counts["requests"] == 15
    end(link, teacher)
    assert job.ended == [DONE]


@pytest.mark.medium
def test_urgent_requests_come_first_and_a_judge_replies_greedily(job: Job) -> None:
    link, teacher = job.link("student"), job.start_teacher()
    pool = job.pool(link, batch_size=1)
    student = job.student(link, pool)
    job.engine.gate.clear()
    pending = student.submit(questions(3), 1)
    eventually(lambda: len(job.engine.calls) == 1)
    judge = greedy_replies(pool, RewardConfig(judge_max_tokens=7), num_retries=0)
    with ThreadPoolExecutor() as threads:
        rewrites = threads.submit(student.rewrite, ["shorter, please"], 1, 0)
        verdicts = threads.submit(judge, ["one"])
        eventually(lambda: job.num_queued() == 4)  # those two beside two questions
        assert not pending.is_ready()
        job.engine.gate.set()
        # The prompt opened the thought.
        assert rewrites.result(SOON) == ["<think>\nso </think> \\boxed{0}"]
        assert verdicts.result(SOON) == ["\\boxed{0}"]
    pending.wait()
    # The first question, the two that the student is idle for, the other two questions.
    assert sorted(job.engine.calls[1:3]) == [(1, 0.0, 7), (1, 1.0, 40)]
    judged = [prompt for prompt in job.engine.prompts if prompt.endswith("</think>\n\n")]
    assert [prompt.count("user\none") for prompt in judged] == [1]  # the judge does not reason
    assert sum(prompt.endswith("<think>\n") for prompt in job.engine.prompts) == 4
    assert job.engine.calls[3:] == [(1, 1.0, 40)] * 2
    assert ("respond", "1/rewrite/0", "shorter, please") in job.engine.paths[1] + job.engine.paths[
        2
    ]
    end(link, teacher)


@pytest.mark.medium
def test_without_an_answer_in_time_the_run_stops_or_goes_on_as_configured(job: Job) -> None:
    link, teacher = job.link("student"), job.start_teacher()
    pool = job.pool(link)
    job.engine.gate.clear()
    assert job.student(link, pool).submit([], 1).wait() == {}
    with pytest.raises(
        TeacherLostError, match=r"no answer to 3 of 3 requests of step 1, .*ncq_only"
    ):
        job.student(link, pool, max_wait_seconds=6.0).submit(questions(3), 1).wait()
    assert len(job.engine.calls) == 1
    hasty = job.student(link, pool, max_wait_seconds=0.5, on_failure="ncq_only")
    assert hasty.submit(questions(3), 2).wait() == {"q0": (), "q1": (), "q2": ()}
    assert hasty.rewrite(["a", "b"], 2, 0) == [None, None]
    assert pool.counts["lost_rollouts"] == 12
    judge = greedy_replies(pool, RewardConfig(judge_max_wait_seconds=0.5), num_retries=0)
    assert judge(["a", "b"]) == [None, None]
    time.sleep(2 * CONNECTION_CHECK_SECONDS)
    eventually(lambda: job.num_queued() == 0)
    job.engine.gate.set()
    answers = job.student(link, pool).submit(questions(3), 3).wait()
    assert all(len(rollouts) == NUM_ROLLOUTS for rollouts in answers.values())
    # Only the first batch was under way when it was given up; none of the others is sampled.
    assert [size for size, _, _ in job.engine.calls] == [3, 3]
    end(link, teacher)


def test_a_question_without_a_prompt_has_no_answer_and_ends_nothing(job: Job) -> None:
    link, teacher = job.link("student"), job.start_teacher()
    pool = job.pool(link)
    picture = MediaRef("image", "shard.tar", "key", "png")
    asked = [*questions(1), Question("seen", "What?", (picture,), "1", "math")]
    answers = job.student(link, pool, on_failure="stop").submit(asked, 1).wait()
    assert [len(rollouts) for rollouts in answers.values()] == [NUM_ROLLOUTS, 0]
    assert pool.counts["faults/http_415"] == 1
    end(link, teacher)


@pytest.mark.medium
def test_the_error_of_a_teacher_rank_is_named_where_the_student_waits(job: Job) -> None:
    link = job.link("student")
    teacher = job.start_teacher()
    pool = job.pool(link)
    student = job.student(link, pool, on_failure="ncq_only", num_retries=20)
    job.engine.trouble = RuntimeError("no memory left")
    named = (
        r"its ranks have ended, got 'rank 5: RuntimeError: no memory left', .*look at the last "
        r"ranks' output"
    )
    with pytest.raises(TeacherLostError, match=named):
        student.submit(questions(1), 1).wait()
    with pytest.raises(TeacherLostError, match=named):
        TeacherRanks(link, SingleProcess()).check()
    with pytest.raises(TeacherLostError, match=named):
        TeacherRanks(link, SingleProcess()).wait_until_ready()
    judge = greedy_replies(pool, RewardConfig(), num_retries=0)
    assert judge(["a"]) == [None]  # soon, and neither right nor wrong
    end(link, teacher)


def test_a_partition_without_heartbeats_counts_as_lost(job: Job) -> None:
    lonely = TeacherRanks(job.link("student", 0.3), SingleProcess())
    with pytest.raises(
        TeacherLostError, match=r"got 'no heartbeat within parallel\.timeout_minutes'"
    ):
        lonely.wait_until_ready()
    server = ChatServer("127.0.0.1")
    sampler = GroupSampler(job.engine, job.encoder, NoGrader(), SingleProcess())
    store = PrefixStore("another job", job.store)
    link = PartitionLink(JobPartition("teacher", 0, 1, 1, store), 0.3)
    ranks = RankServer(link, server, sampler, sampler, SAMPLING, SingleProcess(), lambda: None)
    with pytest.raises(RankFailureError, match="the student's ranks are gone"):
        ranks.serve()
    server.close()


def test_a_partition_with_heartbeats_is_not_lost(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo_mm.parallel.partition.HEARTBEAT_SECONDS", 0.05)
    now = 0.0
    monkeypatch.setattr("zppo_mm.parallel.partition.time", SimpleNamespace(monotonic=lambda: now))
    student, teacher = job.link("student", 10.0), job.link("teacher")
    for _ in range(5):
        before = job.num_heartbeats()
        eventually(lambda before=before: job.num_heartbeats() > before)
        now += 9.0
        assert not student.is_other_lost()

    def is_lost_later() -> bool:
        nonlocal now
        now += 11.0
        return student.is_other_lost()

    teacher.leave()
    eventually(is_lost_later)  # one more heartbeat may be under way


def test_the_first_exit_reason_counts(job: Job) -> None:
    student, teacher = job.link("student"), job.link("teacher")
    assert teacher.exit_reason() is None
    student.leave("rank 1: ConfigError: the cause")
    student.leave("rank 0: RankFailureError: what followed")
    assert teacher.exit_reason() == "rank 1: ConfigError: the cause"
    assert student.exit_reason() is None


def test_the_server_answers_any_client_of_the_protocol(job: Job) -> None:
    link, server = job.link("teacher"), ChatServer("127.0.0.1")
    sampler = GroupSampler(job.engine, job.encoder, NoGrader(), SingleProcess())
    ranks = RankServer(link, server, sampler, sampler, SAMPLING, SingleProcess(), lambda: None)
    thread = threading.Thread(target=ranks.serve, daemon=True)
    thread.start()
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "n": 2, "seed": 4}
    headers = {"Authorization": f"Bearer {server.key}"}
    posted = Request(f"{server.url}/chat/completions", json.dumps(request).encode(), headers)
    with urlopen(posted, timeout=SOON) as response:
        content = json.loads(response.read())
    texts = [choice["message"]["content"] for choice in content["choices"]]
    assert texts == [f"so </think> \\boxed{{{index}}}" for index in range(2)]
    assert content["usage"]["completion_tokens"] == sum(
        len(choice["token_ids"]) for choice in content["choices"]
    )
    assert job.engine.calls == [(1, 1.0, 9)]
    assert job.engine.paths == [[("rollout", "chat/4/0")]]
    end(job.link("student"), thread)
    server.close()


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

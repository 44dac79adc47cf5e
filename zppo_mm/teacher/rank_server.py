"""The teacher's world at work: it answers the student's requests on all its ranks together.

They are taken in their order, but the student stands still for a judge and for rewrites, and not
for answers: these come last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from data.question import Question
from zppo_mm.experience import Rollout
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.parallel.groups import LostRankError
from zppo_mm.teacher.megatron_teacher import MegatronTeacher
from zppo_mm.teacher.rank_channel import (
    MEETING_SECONDS,
    POLL_SECONDS,
    Channel,
    Greeting,
    Judgements,
    Questions,
    Request,
    Rewrites,
    Sampled,
)

logger = logging.getLogger(__name__)

Result = bool | Sequence[str | None] | Mapping[str, tuple[Rollout, ...]]


@dataclass(frozen=True, slots=True)
class _Ungraded:
    parsed: str | None = None
    reward: float = 0.0


class LeaveToStudent:
    """Grades nothing, because the student's ranks do. Implements `Grader`."""

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[_Ungraded]:
        """Return verdicts that mean nothing."""
        return [_Ungraded() for _ in items]


@dataclass(frozen=True, slots=True)
class _Turn:
    """What the leader has all ranks do next: a request or a part of one, nothing for now, or
    leave.
    """

    request: Request | None = None
    last_word: str | None = None


@dataclass(slots=True)
class _Job:
    """A request under way, known to the leader alone."""

    number: int
    request: Request
    started: float
    rollouts: dict[str, tuple[Rollout, ...]] = field(default_factory=dict)


class TeacherServer:
    """Answers until the student has left.

    Questions are answered a few at a time, so that other requests wait for no more than one such
    part, and answers that have been given up cost no more than that.

    Args:
        channel: The way to the student; only the leader's is used.
        teacher: Of this world, with a sampler that does not grade.
        exchange: This world's replicas.
        judge_max_tokens: Longest reply to a judge's prompt.
        num_at_once: Questions answered between two looks at what else there is.
        release_memory: Called after every request.
    """

    def __init__(
        self,
        channel: Channel,
        teacher: MegatronTeacher,
        exchange: Exchange,
        *,
        judge_max_tokens: int,
        num_at_once: int,
        release_memory: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._teacher = teacher
        self._exchange = exchange
        self._judge_max_tokens = judge_max_tokens
        self._num_at_once = num_at_once
        self._release_memory = release_memory
        self._leads = exchange.is_leader and exchange.replica == 0
        self._next_number = 1
        self._jobs: list[_Job] = []
        self._answered: list[int] = []

    def serve(self) -> str:
        """Work until the student leaves; every rank calls this. Returns the student's last word.

        Raises:
            LostRankError: The student is dead or cut off.
        """
        while True:
            (turn,), *_ = self._exchange.gather([self._next_turn()] if self._leads else [])
            if turn.last_word is not None:
                return turn.last_word
            if turn.request is not None:
                result = self._work(turn.request)
                self._release_memory()
                if self._leads:
                    self._note(result)

    def _work(self, request: Request) -> Result:
        """Do what is asked; all ranks get the same result."""
        match request:
            case Questions(questions, step):
                return self._teacher.submit(questions, step).wait()
            case Rewrites(texts, step, attempt):
                return self._teacher.rewrite(texts, step, attempt)
            case Judgements(prompts):
                return self._teacher.judge(prompts, self._judge_max_tokens)
            case Greeting():
                return True

    def _next_turn(self) -> _Turn:
        """Wait for something to do, but not longer than the other ranks should wait."""
        meeting = time.monotonic() + MEETING_SECONDS
        while time.monotonic() < meeting:
            word = self._channel.last_word()
            if word is not None:
                return _Turn(last_word=word)
            if self._channel.is_other_silent():
                raise LostRankError(
                    "teacher: the student's ranks are gone, got no sign of life within "
                    "parallel.timeout_minutes, expected one every few seconds; look at their "
                    "output for the first error, then start the run again to resume"
                )
            self._look_at_requests()
            if self._jobs:
                self._channel.start(self._jobs[0].number)
                return _Turn(self._part(self._jobs[0].request))
            time.sleep(POLL_SECONDS)
        return _Turn()

    def _look_at_requests(self) -> None:
        """Take in new requests, drop finished ones, and put the one that is next to the front."""
        while (request := self._channel.take_request(self._next_number)) is not None:
            self._jobs.append(_Job(self._next_number, request, time.time()))
            self._next_number += 1
        self._answered = [
            number for number in self._answered if not self._channel.clear_if_finished(number)
        ]
        self._jobs = [job for job in self._jobs if not self._channel.clear_if_finished(job.number)]
        self._jobs.sort(key=lambda job: (isinstance(job.request, Questions), job.number))

    def _part(self, request: Request) -> Request:
        return (
            replace(request, questions=request.questions[: self._num_at_once])
            if isinstance(request, Questions)
            else request
        )

    def _note(self, result: Result) -> None:
        """Reply, or go on with what is left of the questions."""
        job = self._jobs[0]
        if not isinstance(job.request, Questions):
            self._reply(job, result)
            return
        assert isinstance(result, Mapping)
        job.rollouts.update(result)
        job.request = replace(job.request, questions=job.request.questions[self._num_at_once :])
        if not job.request.questions:
            # The clocks of two machines may differ by a little, the time that was worked here is
            # certain.
            now = time.time()
            self._reply(
                job, Sampled(job.rollouts, max(now - job.request.asked_at, now - job.started))
            )

    def _reply(self, job: _Job, reply: object) -> None:
        self._channel.answer(job.number, reply)
        self._answered.append(job.number)
        self._jobs.remove(job)

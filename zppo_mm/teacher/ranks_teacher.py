"""The teacher on ranks of its own, as the student's ranks see it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.question import Question
from zppo_mm.config.schema import RewardConfig, TeacherConfig
from zppo_mm.experience import Rollout
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.rollout.sampler import Grader
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
from zppo_mm.teacher.teacher import TeacherLostError

logger = logging.getLogger(__name__)

# Of the time that the student's ranks wait for each other, what one of them may wait for the judge
# to begin.
QUEUE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class _Heard:
    """What the rank that speaks with the teacher tells the others."""

    reply: Any = None
    problem: str = ""
    is_late: bool = False


@dataclass(slots=True)
class PendingAnswers:
    """Answers on their way. Implements `Answers`."""

    teacher: RanksTeacher
    questions: Sequence[Question]
    step: int
    number: int
    deadline: float
    seconds: float = 0.0

    def is_ready(self) -> bool:
        """Return whether the answers are there; see `Answers.is_ready`."""
        return self.teacher.has_reply(self.number)

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        """Wait for the answers and grade them; see `Answers.wait`."""
        sampled: Sampled | None = self.teacher.hear(
            self.number, self.deadline, f"{len(self.questions)} questions of step {self.step}"
        )
        if sampled is None:
            self.seconds = self.teacher.max_wait_seconds
            self.teacher.count_lost(len(self.questions))
            return {question.id: () for question in self.questions}
        self.seconds = sampled.seconds
        return self.teacher.graded(self.questions, sampled.rollouts)


class RanksTeacher:
    """Asks the teacher's world. Implements `Teacher`.

    The leader of the first replica speaks with it; the other ranks hear from that one what came,
    and so all go on, or stop, alike.

    Args:
        channel: The way there, of every student rank.
        config: Waiting, and what a failure means.
        exchange: The student's replicas.
        verifier: Grades the answers, on one rank per replica. The teacher's ranks could not ask the
            judge, who may be themselves.

    Attributes:
        max_wait_seconds: Longest wait for a reply.
        counts: Losses so far on this rank, under the names of the metrics without `teacher/`.
    """

    def __init__(
        self, channel: Channel, config: TeacherConfig, exchange: Exchange, verifier: Grader
    ) -> None:
        self.max_wait_seconds = config.max_wait_seconds
        self.counts: Counter[str] = Counter(lost_rollouts=0)
        self._channel = channel
        self._config = config
        self._exchange = exchange
        self._verifier = verifier
        self._speaks = exchange.is_leader and exchange.replica == 0

    def greet(self) -> None:
        """Wait until the teacher has loaded its weights.

        Raises:
            TeacherLostError: On every rank, if it could not.
        """
        self.hear(self._send(Greeting()), None, "a greeting")

    def check(self) -> None:
        """Look whether the teacher still lives; every rank calls this.

        Raises:
            TeacherLostError: On every rank, if it does not.
        """
        self._heed(self._tell(_Heard(problem=self._problem()) if self._speaks else None))

    def submit(self, questions: Sequence[Question], step: int) -> PendingAnswers:
        """Hand the questions over and return at once."""
        number = self._send(Questions(tuple(questions), step, time.time()))
        return PendingAnswers(
            self, questions, step, number, time.monotonic() + self.max_wait_seconds
        )

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        """Return one response per user text; another attempt draws anew."""
        number = self._send(Rewrites(tuple(texts), step, attempt))
        what = f"{len(texts)} rewrites of step {step}"
        replies: Sequence[str | None] | None = self.hear(
            number, time.monotonic() + self.max_wait_seconds, what
        )
        return [None] * len(texts) if replies is None else replies

    def hear(self, number: int, deadline: float | None, what: str) -> Any:
        """Wait for a reply; every rank calls this and gets the same.

        Args:
            number: Of the request.
            deadline: On the monotonic clock; `None` waits as long as the teacher lives.
            what: Was asked.

        Returns:
            The reply, or `None` if there was none in time and the run goes on without.

        Raises:
            TeacherLostError: On every rank, if the teacher is gone, or there was no reply in time
                and the run is not to go on without.
        """
        heard = _Heard()
        while heard.reply is None and not heard.is_late:
            heard = self._tell(self._listen(number, deadline) if self._speaks else None)
            self._heed(heard)
        if self._speaks:
            self._channel.finish(number)
        if not heard.is_late:
            return heard.reply
        late = (
            f"teacher: no answer to {what}, got none within "
            f"teacher.max_wait_seconds={self.max_wait_seconds:g}"
        )
        if self._config.on_failure != "ncq_only":
            raise TeacherLostError(
                f"{late}, expected one; raise it, give the teacher more ranks, or set "
                "teacher.on_failure=ncq_only to go on without"
            )
        logger.warning("%s; the run goes on without", late)
        return None

    def has_reply(self, number: int) -> bool:
        """Return whether a reply is there; every rank calls this and gets the same."""
        (told,), *_ = self._exchange.gather(
            [self._channel.has_reply(number)] if self._speaks else []
        )
        return told

    def graded(
        self, questions: Sequence[Question], sampled: Mapping[str, Sequence[Rollout]]
    ) -> dict[str, tuple[Rollout, ...]]:
        """Grade every replica's share of the answers and exchange; one that cannot be graded is
        left out.
        """
        mine = (
            range(self._exchange.replica, len(questions), self._exchange.num_replicas)
            if self._exchange.is_leader
            else range(0)
        )
        items = [
            (questions[place], rollout)
            for place in mine
            for rollout in sampled[questions[place].id]
        ]
        verdicts = iter(
            self._verifier.verify_all([(question, rollout.text) for question, rollout in items])
            if items
            else []
        )
        local = []
        for place in mine:
            marked = [(rollout, next(verdicts)) for rollout in sampled[questions[place].id]]
            graded = tuple(
                replace(r, parsed=v.parsed, reward=float(v.reward))
                for r, v in marked
                if v.reward is not None
            )
            local.append((questions[place].id, graded))
        found = dict(each for share in self._exchange.gather(local) for each in share)
        return {question.id: found[question.id] for question in questions}

    def count_lost(self, num_questions: int) -> None:
        """Count the rollouts of questions without an answer, on one rank."""
        if self._speaks:
            self.counts["lost_rollouts"] += num_questions * self._config.num_rollouts

    def _send(self, request: Request) -> int:
        return self._channel.request(request) if self._speaks else 0

    def _listen(self, number: int, deadline: float | None) -> _Heard:
        """Look for the reply until it is there, it is too late, or the other ranks should hear
        something.
        """
        meeting = time.monotonic() + MEETING_SECONDS
        while True:
            reply = self._channel.reply(number)
            if reply is not None:
                return _Heard(reply)
            now, problem = time.monotonic(), self._problem()
            is_late = deadline is not None and now >= deadline
            if problem or is_late or now >= meeting:
                return _Heard(None, problem, is_late)
            time.sleep(POLL_SECONDS)

    def _problem(self) -> str:
        """Return why the teacher is gone; empty while it is not."""
        word = self._channel.last_word()
        if word is not None:
            return word
        return (
            "no sign of life within parallel.timeout_minutes"
            if self._channel.is_other_silent()
            else ""
        )

    def _tell(self, heard: _Heard | None) -> _Heard:
        """Return on every rank what the one that speaks has heard."""
        (told,), *_ = self._exchange.gather([heard] if heard is not None else [])
        return told

    def _heed(self, heard: _Heard) -> None:
        if heard.problem:
            raise TeacherLostError(
                f"teacher: its ranks have ended, got {heard.problem!r}, expected them to live as "
                "long as the student; look at the last ranks' output, then start the run again to "
                "resume"
            )


def replies_of_ranks(
    channel: Channel,
    config: RewardConfig,
    should_stop: Callable[[], bool] = bool,
    *,
    queue_seconds: float = 0.0,
) -> Callable[[Sequence[str]], list[str | None]]:
    """Return a function from prompts to one greedy reply each, `None` where none comes in time;
    callable from one rank alone.

    The judge's time begins when the teacher's ranks begin: an answer that they are at may be long.

    Args:
        channel: The way there.
        config: Time for a reply.
        should_stop: Whether what is judged will be dropped anyway, so that nothing is to be waited
            for.
        queue_seconds: Longest wait in all, if that is longer; the other ranks of the student stand
            still in it.
    """

    def complete(prompts: Sequence[str]) -> list[str | None]:
        number = channel.request(Judgements(tuple(prompts)))
        last = time.monotonic() + max(queue_seconds, config.judge_max_wait_seconds)
        deadline = last
        has_started = False
        while (
            (reply := channel.reply(number)) is None
            and time.monotonic() < deadline
            and channel.last_word() is None
        ):
            if should_stop():
                break
            if not has_started and channel.has_started(number):
                has_started, deadline = (
                    True,
                    min(last, time.monotonic() + config.judge_max_wait_seconds),
                )
            time.sleep(POLL_SECONDS)
        channel.finish(number)
        return reply if reply is not None else [None] * len(prompts)

    return complete

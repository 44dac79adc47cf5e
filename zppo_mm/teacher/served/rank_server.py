"""The teacher's ranks at work: they answer the requests of their leader's server together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.question import Question
from zppo_mm.experience import Group, PromptInstance
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.parallel.failures import RankFailureError
from zppo_mm.parallel.partition import PartitionLink
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.teacher.served.chat_server import ChatServer, PendingRequest, ReceivedRequest, Reply

# How long the leader waits for requests before it checks on the student, and how long the other
# ranks wait for it: a collective that lasts would reach its time limit.
POLL_SECONDS = 0.2
EXCHANGE_SECONDS = 5.0


class NoGrader:
    """Grades nothing, because the student's ranks do. Implements `Grader`."""

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """Return verdicts that mean nothing."""
        return [Verdict(None, 0.0, "mismatch") for _ in items]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the leader has all ranks do next: answer requests, if there are any, or leave."""

    requests: tuple[ReceivedRequest, ...] = ()
    exit_reason: str | None = None


@dataclass(frozen=True, slots=True)
class RankServer:
    """Answers until the student has left.

    Attributes:
        link: To the student's partition.
        server: Receives requests; `None` on all ranks but the leader.
        sampler: Of the teacher, without a grader.
        sampler_without_thinking: The same for requests that turn reasoning off.
        sampling: Its stop tokens.
        exchange: The teacher's replicas.
        release_memory: Called after every batch.
    """

    link: PartitionLink
    server: ChatServer | None
    sampler: GroupSampler
    sampler_without_thinking: GroupSampler
    sampling: SamplingParams
    exchange: Exchange
    release_memory: Callable[[], None]

    def serve(self) -> str:
        """Answer batch after batch; every rank calls this. Returns why the student ended.

        Raises:
            RankFailureError: The student's processes are gone or cut off.
        """
        while True:
            turns: list[Turn] = []
            batch: list[PendingRequest] = []
            if self.server is not None:
                turn, batch = self.next_turn(self.server)
                turns = [turn]
            (turn,), *_ = self.exchange.gather(turns)
            if turn.exit_reason is not None:
                return turn.exit_reason
            if turn.requests:
                replies = self._answer(turn.requests)
                self.release_memory()
                for pending, reply in zip(batch, replies, strict=False):  # the leader has a batch
                    pending.reply.set_result(reply)

    def next_turn(self, server: ChatServer) -> tuple[Turn, list[PendingRequest]]:
        """Wait for something to do, but not longer than the other ranks should wait."""
        deadline = time.monotonic() + EXCHANGE_SECONDS
        while time.monotonic() < deadline:
            exit_reason = self.link.exit_reason()
            if exit_reason is not None:
                return Turn(exit_reason=exit_reason), []
            if self.link.is_other_lost():
                raise RankFailureError(
                    "teacher: the student's ranks are gone, got no heartbeat within "
                    "parallel.timeout_minutes, expected one every few seconds; look at their "
                    "output for the first error, then start the run again to resume"
                )
            batch = server.take_batch(POLL_SECONDS)
            if batch:
                return Turn(tuple(pending.request for pending in batch)), batch
        return Turn(), []

    def _answer(self, requests: Sequence[ReceivedRequest]) -> list[Reply]:
        """Answer requests of equal settings; all ranks get the same replies."""
        first = requests[0]
        sampling = replace(
            self.sampling, temperature=first.temperature, max_new_tokens=first.max_tokens
        )
        sampler = self.sampler_without_thinking if first.is_without_thinking else self.sampler
        kind, name = first.stream
        if kind == "respond":
            texts = sampler.respond([each.text for each in requests], sampling, name)
            return [
                _refusal(sampler.failed[f"{name}/{index}"]) if text is None else _text_reply(text)
                for index, text in enumerate(texts)
            ]
        instances = [_instance(request) for request in requests]
        groups = sampler.sample(instances, sampling, first.num_choices, step=0)
        by_uid = {group.instance.uid: group for group in groups}
        return [
            _group_reply(by_uid[instance.uid])
            if instance.uid in by_uid
            else _refusal(sampler.failed[instance.uid])
            for instance in instances
        ]


def _instance(request: ReceivedRequest) -> PromptInstance:
    uid = request.stream[1]
    question = Question(uid, request.text, request.media, "", "open", earlier=request.earlier)
    return PromptInstance(uid, question, "new", request.text)


def _refusal(reason: str) -> Reply:
    return 415, {"error": reason}


def _text_reply(text: str) -> Reply:
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


def _group_reply(group: Group) -> Reply:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": rollout.text},
            "finish_reason": rollout.finish_reason,
            "token_ids": rollout.response_ids.tolist(),
            "token_logprobs": np.asarray(rollout.rollout_logprobs).tolist(),
        }
        for index, rollout in enumerate(group.rollouts)
    ]
    usage = {
        "prompt_tokens": len(group.prompt.token_ids),
        "completion_tokens": sum(len(rollout.response_ids) for rollout in group.rollouts),
    }
    return 200, {"choices": choices, "usage": usage}

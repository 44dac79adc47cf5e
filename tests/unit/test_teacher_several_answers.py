"""Servers that refuse, break off or repeat some of several answers to a message."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.pool_asking import GOOD, PATIENT, ask, faults, reply_with, texts
from tests.support.raw_server import RawServer, Say, completion, http, say, serve_raw
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.pool import EndpointPool

pytestmark = pytest.mark.timeout(120)


def test_of_several_answers_those_that_cannot_be_used_are_counted_and_asked_for_alone() -> None:
    states = {"a": "stop", "b": "abort", "c": "length", "d": "stop"}
    choices = [
        {"index": i, "message": {"content": t}, "finish_reason": state}
        for i, (t, state) in enumerate(states.items())
    ]
    some = say(http(json.dumps({"choices": choices[:2]}).encode()))
    with serve_raw(lambda number: some if number == 0 else say(http(completion("e")))) as server:
        outcome, counts = ask(server.url)
    assert texts(outcome) == ["a", "e"]
    assert (faults(counts), counts["requests"], counts["retries"]) == ({"unfinished": 1}, 2, 0)
    with serve_raw(lambda number: say(http(json.dumps({"choices": choices}).encode()))) as server:
        outcome, counts = ask(server.url)
    assert [(choice.text, choice.finish_reason) for choice in outcome.answers()] == [
        ("a", "stop"),
        ("c", "length"),
    ]
    assert faults(counts) == {"unfinished": 1, "surplus_choice": 1}


def drawing(
    refuse: str = "", broken: tuple[int, ...] = ()
) -> tuple[list[RawServer], Callable[[int], Say]]:
    """Return a plan whose answers are their seeds, one further for each of a request, and the list
    that takes its server.

    Args:
        refuse: Status of the reply to a request for several.
        broken: Which of several answers are not finished.
    """
    servers: list[RawServer] = []

    def reply_to(connection: socket.socket, number: int) -> None:
        request = json.loads(servers[0].requests[number][1])
        num = request.get("n", 1)
        if num > 1 and refuse:
            connection.sendall(http(b'{"error": {"message": "n must be 1"}}', status=refuse))
            return
        states = {i: "abort" if num > 1 and i in broken else "stop" for i in range(num)}
        choices = [
            {
                "index": i,
                "message": {"content": str(request["seed"] + i)},
                "finish_reason": states[i],
            }
            for i in states
        ]
        connection.sendall(http(json.dumps({"choices": choices}).encode()))

    return servers, lambda number: lambda connection: reply_to(connection, number)


@pytest.mark.parametrize("status", ["400 Bad Request", "422 No", "500 Error", "501 No"])
def test_a_server_that_refuses_several_answers_is_asked_for_each(status: str) -> None:
    servers, plan = drawing(refuse=status)
    with serve_raw(plan) as server:
        servers.append(server)
        outcome, counts = ask(server.url, RetryPolicy(max_seconds=60.0, num_retries=None))
    assert texts(outcome) == ["0", "1"]
    assert faults(counts) == {f"http_{status[:3]}": 2 if status.startswith("5") else 1}


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)])
def test_no_draw_counts_twice_when_some_of_several_are_drawn_again(broken: tuple[int, ...]) -> None:
    servers, plan = drawing(broken=broken)
    with serve_raw(plan) as server:
        servers.append(server)
        outcome, _ = ask(server.url, RetryPolicy(max_seconds=5.0, num_retries=len(broken)))
    assert len(set(texts(outcome))) == (2 if len(broken) == 1 else 0)


@pytest.mark.parametrize(
    "said",
    [
        {"message": {"content": ""}, "finish_reason": "length"},
        {"message": {"content": None}},
        {"message": {}, "finish_reason": "tool_calls"},
    ],
)
def test_a_question_that_the_model_does_not_answer_is_drawn_again_and_then_left_out(
    said: dict[str, Any],
) -> None:
    with serve_raw(lambda number: say(reply_with(**said))) as server:
        outcome, counts = ask(
            server.url, RetryPolicy(max_seconds=60.0, num_retries=None), config={"num_retries": 2}
        )
        seeds = {json.loads(body)["seed"] for _, body in server.requests}
    assert (outcome.answers(), outcome.is_refused, counts["requests"]) == ([], True, 3)
    assert len(seeds) == 3


def test_what_one_server_refuses_is_asked_of_another() -> None:
    refuse = say(http(b'{"error": "context of 512 tokens"}', status="400 Bad Request"))
    with serve_raw(lambda number: refuse) as small, serve_raw(lambda number: GOOD) as large:
        pool = EndpointPool([small.url, large.url], "tiny", TeacherConfig(backoff_seconds=0.01))
        (outcome,) = pool.submit([ChatRequest("?", 1, 1.0, 16, 0)], PATIENT).result(timeout=60)
        pool.close()
    assert texts(outcome) == ["3"]
    with serve_raw(lambda number: refuse) as one, serve_raw(lambda number: refuse) as other:
        pool = EndpointPool([one.url, other.url], "tiny", TeacherConfig(backoff_seconds=0.01))
        (outcome,) = pool.submit(
            [ChatRequest("?", 1, 1.0, 16, 0)], RetryPolicy(max_seconds=60.0, num_retries=None)
        ).result(timeout=60)
        pool.close()
    assert (len(one.requests), len(other.requests), outcome.is_refused) == (1, 1, True)

"""The HTTP server of a teacher on ranks of its own: what it refuses, and its batches."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from typing import Any

import pytest

from zppo_mm.teacher.served.chat_api import Batch
from zppo_mm.teacher.served.chat_server import PATH, ChatServer, ReceivedRequest, job_address

pytestmark = pytest.mark.timeout(120)
SOON = 60.0


def post(server: ChatServer, body: object, key: str | None = None, path: str = PATH) -> Any:
    """Return status and content of a reply to a request that any client could send."""
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=SOON)
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {server.key if key is None else key}"}
    connection.request("POST", path, given, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_the_server_refuses_what_is_no_request_and_who_has_no_key() -> None:
    server = ChatServer("127.0.0.1")
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    assert post(server, request, key="guess")[0] == 401
    assert post(server, request, key="\u00e9")[0] == 401
    assert post(server, request, path="/v1/models")[0] == 404
    answered = [*request["messages"], {"role": "assistant", "content": "Hello"}]
    pictured = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    for wrong in (
        b"{",
        [],
        {"messages": []},
        request | {"messages": answered},
        request | {"messages": pictured},
        request | {"n": 0},
        request | {"max_tokens": 0},
        request | {"temperature": -1},
        request | {"zppo": {"stream": ["other", "name"]}},
        request | {"zppo": {"batch": {"name": "b"}}},
    ):
        assert post(server, wrong)[0] == 400, wrong
    assert server.take_batch(0.0) == []
    server.close()


@pytest.mark.medium
def test_a_batch_that_stays_incomplete_is_answered_without_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = ChatServer("127.0.0.1")
    monkeypatch.setattr("zppo_mm.teacher.served.chat_server.BATCH_SECONDS", 0.5)

    def request(name: str, index: int, size: int) -> ReceivedRequest:
        return ReceivedRequest("Hi", (), 1, 1.0, 9, ("rollout", name), Batch(name, index, size))

    server.add(request("part", 2, 3))
    server.add(request("part", 0, 3))
    dropped = server.add(request("whole", 1, 3))
    server.add(request("whole", 0, 2))
    server.drop(dropped)
    assert server.take_batch(0.1) == []
    server.add(request("whole", 1, 2))
    batches = [server.take_batch(5.0) for _ in range(2)]
    found = [[(each.request.batch.name, each.request.batch.index) for each in b] for b in batches]
    assert found == [[("whole", 0), ("whole", 1)], [("part", 0), ("part", 2)]]
    server.close()


def test_the_server_listens_where_rank_zero_can_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert job_address() == "127.0.0.1"

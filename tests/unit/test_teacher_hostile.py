"""Servers that break every rule, on real sockets: what they do is counted, costs little, and the
next reply is used.
"""

from __future__ import annotations

import gzip
import json
import resource
import socket
import time
import zlib

import pytest

from tests.support.pool_asking import GOOD, ask, faults, reply_with, texts
from tests.support.raw_server import completion, http, say, say_forever, serve_raw
from zppo_mm.config.load import load_config
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.connect import open_pool

pytestmark = pytest.mark.timeout(120)
# No behaviour may cost more memory than a few replies of the largest size that is read.
MAX_GROWTH_KIB = 150_000


def trickle(connection: socket.socket) -> None:
    """A byte now and then: never silent for long, and never done."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.2)


def trickle_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.2)


MEGABYTE = b"x" * 2**20
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(b" " * 2**28)
PAGE = b'{"error": {"message": "no"}}'
BAD = {
    "body without end": (say_forever(b"HTTP/1.1 200 OK\r\n\r\n", MEGABYTE), "too_large"),
    "body without end, HTTP/1.0": (say_forever(b"HTTP/1.0 200 OK\r\n\r\n", MEGABYTE), "too_large"),
    "chunks without end": (say_forever(CHUNKED, b"100000\r\n" + MEGABYTE + b"\r\n"), "too_large"),
    "error page without end": (say_forever(b"HTTP/1.1 500 Oops\r\n\r\n", MEGABYTE), "http_500"),
    "gzip bomb": (say(http(BOMB, "Content-Encoding: gzip")), "too_large"),
    "deflate bomb": (say(http(zlib.compress(b" " * 2**28), "Content-Encoding: deflate")),
    "too_large"),
    "gzip bomb as an error": (say(http(BOMB, "Content-Encoding: gzip", status="503 Busy")),
    "http_503"),
    "gzip in gzip": (say(http(gzip.compress(BOMB), "Content-Encoding: gzip, gzip")), "bad_reply"),
    "gzip in gzip, two headers": (say(http(gzip.compress(BOMB), "Content-Encoding: gzip",
    "Content-Encoding: gzip")), "bad_reply"),
    "zstd": (say(http(b"\x28\xb5\x2f\xfd", "Content-Encoding: zstd")), "bad_reply"),
    "br": (say(http(b"\xcf\xff\xff", "Content-Encoding: br")), "bad_reply"),
    "broken gzip": (say(http(b"\x1f\x8b" + b"\xff" * 50, "Content-Encoding: gzip")), "bad_reply"),
    "unknown charset": (say(http(PAGE, "Content-Type: application/json; charset=zlib",
    status="500 Oops")), "http_500"),
    "charset that is none": (say(http(PAGE,
    "Content-Type: text/html; charset=\u00e9\udcff".encode("utf-8", "ignore").decode(),
                                      status="502 Bad")), "http_502"),
    "nested JSON": (say(http(b"[" * 300_000)), "bad_reply"),
    "nested JSON instead": (say(http(b'{"choices":' * 80_000)), "bad_reply"),
    "error with status 200": (say(http(b'{"error": {"message": "overloaded", "code": 503}}')),
    "bad_reply"),
    "event stream": (say(http(b'data: {"choices": []}\n\ndata: [DONE]\n\n',
    "Content-Type: text/event-stream")), "bad_reply"),
    "aborted": (say(reply_with(finish_reason="abort")), "unfinished"),
    "no state": (say(reply_with(finish_reason=None)), "unfinished"),
    "calls a tool": (say(reply_with(finish_reason="tool_calls",
    message={"content": None, "tool_calls": [{}]})), "unfinished"),
    "two lengths": (say(http(completion("3", "4"), "Content-Length: 5")), "cut_off"),
    "negative length": (say(http(b"{}", "Content-Length: -5", length=False)), "cut_off"),
    "more than it says": (say(http(completion("3", "4"), "Content-Length: 9", length=False)),
    "bad_reply"),
    "less than it says": (say(http(completion("3", "4"), "Content-Length: 99999", length=False)),
    "cut_off"),
    "less, and no length": (say(http(completion("3", "4")[:-9], length=False)), "bad_reply"),
    "chunk sizes that are none": (say(CHUNKED, b"-5\r\nhello\r\n0\r\n\r\n"), "cut_off"),
    "huge header": (say(http(completion("3", "4"), "X-Huge: " + "x" * 300_000)), "cut_off"),
    "headers without end": (say_forever(b"HTTP/1.1 200 OK\r\n",
    b"X-Again: " + b"x" * 1000 + b"\r\n"), "cut_off"),
    "no HTTP": (say(b"\x16\x03\x01\x02\x00\x01\x00" * 100), "cut_off"),
    "nothing": (say(b""), "cut_off"),
    "interim replies without end": (say_forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "timeout"),
    "slow body": (trickle, "timeout"),
    "slow head": (trickle_head, "timeout"),
    "silence": (lambda connection: time.sleep(10), "timeout"),
    "another protocol": (say(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), "cut_off"),
    "no content": (say(b"HTTP/1.1 204 No Content\r\n\r\n"), "http_204"),
    "part": (say(http(completion("3", "4"), status="206 Partial")), "http_206"),
    "redirect to nowhere": (say(http(b"", "Location: http://[::1", status="302 Found")),
    "http_302"),
    "redirect of no address": (say(http(b"", "Location: \x01\u00e9//@:99999999",
    status="307 Found")), "http_307"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.medium
def test_what_no_server_should_do_is_counted_and_the_next_reply_used(name: str) -> None:
    bad, kind = BAD[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serve_raw(lambda number: bad if number == 0 else GOOD) as server:
        outcome, counts = ask(server.url)
    assert texts(outcome) == ["3", "4"]
    assert outcome.problem == ""
    assert faults(counts) == {kind: 1}
    assert (counts["requests"], counts["retries"]) == (2, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


HALF = json.dumps(
    {
        "choices": [
            {"index": i, "message": {"content": t}, "finish_reason": "stop"}
            for i, t in enumerate("\ud83d4")
        ]
    }
)
STRANGE = {
    "compressed": (http(gzip.compress(completion("3", "4")), "Content-Encoding: gzip"), ["3", "4"]),
    "deflated": (
        http(zlib.compress(completion("3", "4")), "Content-Encoding: deflate"),
        ["3", "4"],
    ),
    "until the connection ends": (
        http(completion("3", "4"), version="1.0", length=False),
        ["3", "4"],
    ),
    "interim reply": (
        b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + http(completion("3", "4")),
        ["3", "4"],
    ),
    "another charset": (
        http(completion("3", "4"), "Content-Type: application/json; charset=utf-16"),
        ["3", "4"],
    ),
    "headers beyond ASCII": (http(completion("3", "4"), "X-\u00dcber: \u00e9"), None),
    "values beyond ASCII": (
        http(completion("3", "4"), "Server: \u00e9\u4e2d", "Server: \u00e9"),
        ["3", "4"],
    ),
    "usage without end": (
        http(completion("3", "4", usage={"prompt_tokens": 1e999, "completion_tokens": -1})),
        ["3", "4"],
    ),
    "half a surrogate pair": (http(HALF.encode()), ["\ufffd", "4"]),
    "many cookies": (
        http(
            completion("3", "4"),
            *(f"Set-Cookie: c{i}=1; Expires=Wed, 99 Foo 99999999999" for i in range(50)),
        ),
        ["3", "4"],
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_only_strange_is_used_or_asked_for_again(name: str) -> None:
    strange, expected = STRANGE[name]
    with serve_raw(lambda number: say(strange) if number == 0 else GOOD) as server:
        outcome, counts = ask(server.url)
    assert texts(outcome) == (expected or ["3", "4"])
    assert sum(faults(counts).values()) == (expected is None)


@pytest.mark.parametrize(
    "value",
    [
        "99999999",
        "1e999",
        "nan",
        "-1",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Mon, 99 Foo 99999",
        "x" * 9000,
        "\u00e9",
    ],
)
def test_no_server_decides_how_long_it_is_left_alone(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo_mm.serving.endpoint.MAX_PAUSE_SECONDS", 0.5)
    busy = say(http(PAGE, f"Retry-After: {value}", status="429 Busy"))
    with serve_raw(lambda number: busy if number == 0 else GOOD) as server:
        outcome, counts = ask(server.url)
    assert texts(outcome) == ["3", "4"]
    assert faults(counts) == {"http_429": 1}


def test_a_server_that_never_does_better_costs_only_its_questions() -> None:
    with serve_raw(lambda number: BAD[sorted(BAD)[number % 4]][0]) as server:
        lost, counts = ask(server.url, RetryPolicy(max_seconds=60.0, num_retries=3))
        assert lost.answers() == []
        assert sum(faults(counts).values()) == 4
        late, _ = ask(server.url, RetryPolicy(max_seconds=1.0, num_retries=None))
    assert late.problem.startswith("not answered within 1 s")


@pytest.mark.parametrize(
    "name",
    ["body without end", "gzip bomb", "nested JSON", "unknown charset", "no state", "no HTTP"],
)
def test_a_probe_holds_nothing_up(name: str, caplog: pytest.LogCaptureFixture) -> None:
    bad, kind = BAD[name]
    with serve_raw(lambda number: bad) as server:
        config = load_config(None, [f"teacher.endpoints=['{server.url}']", "teacher.model=tiny"])
        started = time.monotonic()
        pool = open_pool(config.teacher, SingleProcess())
        assert time.monotonic() - started < 50  # the probe's own limit is not needed
        assert pool is not None
        pool.close()
    assert f"does not answer yet: {kind}: " in caplog.text

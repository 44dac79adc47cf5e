"""Servers that break every rule, on real sockets: what they do is counted, costs little, and the
next reply is used.
"""

from __future__ import annotations

import gzip
import json
import logging
import resource
import socket
import ssl
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import free_port
from tests.support.raw_server import RawServer, Say, completion, http, say, say_forever, serve_raw
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.teacher.served.chat_api import Ask
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.servers import Outcome, Patience

pytestmark = pytest.mark.timeout(120)
KEY = "sk-0123456789abcdef"
ASK = Ask("What is 3 + 1?", 2, 1.0, 16, 0)
GOOD = say(http(completion("3", "4")))
PATIENT = Patience(max_seconds=60.0, num_retries=3)
# No behaviour may cost more memory than a few replies of the largest size that is read.
MAX_GROWTH_KIB = 150_000


def ask(url: str, patience: Patience = PATIENT, **options: Any) -> tuple[Outcome, Counter[str]]:
    times = {
        "connect_timeout_seconds": 2.0,
        "read_timeout_seconds": 2.0,
        "request_timeout_seconds": 3.0,
        "backoff_seconds": 0.01,
    }
    config = TeacherConfig(**{**times, **options.pop("config", {})})
    pool = EndpointPool([url], "tiny", config, **options)
    try:
        (outcome,) = pool.submit([ASK], patience).result(timeout=100)
        return outcome, pool.counts
    finally:
        pool.close()


def texts(outcome: Outcome) -> list[str]:
    return [choice.text for choice in outcome.answers()]


def faults(counts: Counter[str]) -> dict[str, int]:
    return {
        name.removeprefix("faults/"): count
        for name, count in counts.items()
        if name.startswith("faults/")
    }


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


def reply_with(**fields: Any) -> bytes:
    return http(
        json.dumps(
            {
                "choices": [
                    {"index": 0, "message": {"content": "4"}, "finish_reason": "stop", **fields}
                ]
            }
        ).encode()
    )


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
    "nested JSON in its place": (say(http(b'{"choices":' * 80_000)), "bad_reply"),
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
    monkeypatch.setattr("zppo_mm.teacher.served.endpoint.MAX_PAUSE_SECONDS", 0.5)
    busy = say(http(PAGE, f"Retry-After: {value}", status="429 Busy"))
    with serve_raw(lambda number: busy if number == 0 else GOOD) as server:
        outcome, counts = ask(server.url)
    assert texts(outcome) == ["3", "4"]
    assert faults(counts) == {"http_429": 1}


def test_a_server_that_never_does_better_costs_only_its_questions() -> None:
    with serve_raw(lambda number: BAD[sorted(BAD)[number % 4]][0]) as server:
        lost, counts = ask(server.url, Patience(max_seconds=60.0, num_retries=3))
        assert lost.answers() == []
        assert sum(faults(counts).values()) == 4
        late, _ = ask(server.url, Patience(max_seconds=1.0, num_retries=None))
    assert late.problem.startswith("not answered within 1 s")


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
    """Return a plan whose answers are their seeds, one further for each of a request, and a place
    for its server.

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
        outcome, counts = ask(server.url, Patience(max_seconds=60.0, num_retries=None))
    assert texts(outcome) == ["0", "1"]
    assert faults(counts) == {f"http_{status[:3]}": 2 if status.startswith("5") else 1}


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)])
def test_no_draw_counts_twice_when_some_of_several_are_drawn_again(broken: tuple[int, ...]) -> None:
    servers, plan = drawing(broken=broken)
    with serve_raw(plan) as server:
        servers.append(server)
        outcome, _ = ask(server.url, Patience(max_seconds=5.0, num_retries=len(broken)))
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
            server.url, Patience(max_seconds=60.0, num_retries=None), config={"num_retries": 2}
        )
        seeds = {json.loads(body)["seed"] for _, body in server.requests}
    assert (outcome.answers(), outcome.is_refused, counts["requests"]) == ([], True, 3)
    assert len(seeds) == 3


def test_what_one_server_refuses_is_asked_of_another() -> None:
    refuse = say(http(b'{"error": "context of 512 tokens"}', status="400 Bad Request"))
    with serve_raw(lambda number: refuse) as small, serve_raw(lambda number: GOOD) as large:
        pool = EndpointPool([small.url, large.url], "tiny", TeacherConfig(backoff_seconds=0.01))
        (outcome,) = pool.submit([Ask("?", 1, 1.0, 16, 0)], PATIENT).result(timeout=60)
        pool.close()
    assert texts(outcome) == ["3"]
    with serve_raw(lambda number: refuse) as one, serve_raw(lambda number: refuse) as other:
        pool = EndpointPool([one.url, other.url], "tiny", TeacherConfig(backoff_seconds=0.01))
        (outcome,) = pool.submit(
            [Ask("?", 1, 1.0, 16, 0)], Patience(max_seconds=60.0, num_retries=None)
        ).result(timeout=60)
        pool.close()
    assert (len(one.requests), len(other.requests), outcome.is_refused) == (1, 1, True)


def test_redirects_are_not_followed() -> None:
    with (
        serve_raw(lambda number: GOOD) as other,
        serve_raw(
            lambda number: say(
                http(b"", f"Location: {other.url}/chat/completions", status="307 Moved")
            )
        ) as server,
    ):
        outcome, _ = ask(server.url, Patience(max_seconds=60.0, num_retries=0), api_key=KEY)
        assert (
            outcome.problem == f"http_307: {server.url}: HTTP 307 to {other.url}/chat/completions:"
        )
        config = load_config(None, [f"teacher.endpoints=['{server.url}']", "teacher.model=tiny"])
        with pytest.raises(
            ConfigError,
            match=rf"refuses the model 'tiny', got 'http_307: .* to {other.url}.*redirects nowhere",
        ):
            open_pool(config.teacher, SingleProcess())
    assert other.requests == []


def test_a_second_reply_is_not_taken_for_that_of_the_next_request() -> None:
    def twice(connection: socket.socket) -> None:
        connection.sendall(http(completion("3", "4")) + http(completion("forged", "forged")))
        time.sleep(2.0)  # the connection could be used again

    def plan(number: int) -> Say:
        return twice if number == 0 else say(http(completion("5", "6")))

    with serve_raw(plan) as server:
        pool = EndpointPool([server.url], "tiny", TeacherConfig())
        first, second = (pool.submit([ASK], PATIENT).result(timeout=60)[0] for _ in range(2))
        pool.close()
    assert (texts(first), texts(second)) == (["3", "4"], ["5", "6"])


def test_no_cookie_comes_back() -> None:
    with serve_raw(
        lambda number: say(http(completion("3", "4"), "Set-Cookie: a=b; Path=/"))
    ) as server:
        pool = EndpointPool([server.url], "tiny", TeacherConfig())
        for _ in range(2):
            pool.submit([ASK], PATIENT).result(timeout=60)
        pool.close()
    assert len(server.requests) == 2
    assert not any(b"cookie" in head.lower() for head, _ in server.requests)


def test_the_key_goes_nowhere_but_to_the_server(caplog: pytest.LogCaptureFixture) -> None:
    page = (
        f'{{"error": "key {KEY[:8]}\\u{ord(KEY[8]):04x}{KEY[9:]} is not welcome\x1b[2J"}}'.encode()
    )
    replies = [http(page, status="403 No"), http(page), http(completion(f"Your key is {KEY}", "4"))]
    with (
        caplog.at_level(logging.DEBUG),
        serve_raw(lambda number: say(replies[min(number, 2)])) as server,
    ):
        outcome, _ = ask(server.url, api_key=KEY)
        refused, _ = ask(
            server.url.replace("127.0.0.1", "localhost"),
            Patience(max_seconds=60.0, num_retries=0),
            api_key=KEY,
        )
    assert all(f"Authorization: Bearer {KEY}".encode() in head for head, _ in server.requests)
    assert texts(outcome) == ["Your key is ***", "4"]
    shown = "\n".join([caplog.text, outcome.problem, refused.problem, repr(outcome), repr(refused)])
    assert KEY not in shown
    assert "***" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    "name",
    ["body without end", "gzip bomb", "nested JSON", "unknown charset", "no state", "no HTTP"],
)
def test_a_greeting_holds_nothing_up(name: str, caplog: pytest.LogCaptureFixture) -> None:
    bad, kind = BAD[name]
    with serve_raw(lambda number: bad) as server:
        config = load_config(None, [f"teacher.endpoints=['{server.url}']", "teacher.model=tiny"])
        started = time.monotonic()
        pool = open_pool(config.teacher, SingleProcess())
        assert time.monotonic() - started < 50  # the greeting's own limit is not needed
        assert pool is not None
        pool.close()
    assert f"does not answer yet: {kind}: " in caplog.text


def self_signed(folder: Path) -> ssl.SSLContext:
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout key.pem "
        "-out cert.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def test_a_certificate_that_nobody_signed_is_named_at_once(tmp_path: Path) -> None:
    with serve_raw(lambda number: GOOD, self_signed(tmp_path)) as server:
        outcome, counts = ask(server.url, Patience(max_seconds=60.0, num_retries=0), api_key=KEY)
        assert faults(counts) == {"certificate": 1}
        assert outcome.problem.startswith("certificate: ")
        config = load_config(None, [f"teacher.endpoints=['{server.url}']", "teacher.model=tiny"])
        with pytest.raises(ConfigError, match=r"got 'certificate: .*server's certificate"):
            open_pool(config.teacher, SingleProcess())
    assert server.requests == []


def test_proxies_of_the_environment_see_no_plain_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with serve_raw(lambda number: GOOD) as server:
        assert texts(ask(server.url, api_key=KEY)[0]) == ["3", "4"]
    with serve_raw(lambda number: say(http(b"", status="403 No"))) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.removesuffix("/v1"))
        ask("https://teacher.invalid/v1", Patience(max_seconds=60.0, num_retries=0), api_key=KEY)
    assert [head.split(b"\r\n")[0] for head, _ in proxy.requests] == [
        b"CONNECT teacher.invalid:443 HTTP/1.1"
    ]
    assert KEY.encode() not in proxy.requests[0][0]


@pytest.mark.parametrize("proxy", ["socks9://x", "http://:::99999999"])
def test_an_environment_without_a_usable_client_is_an_error_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    config = load_config(
        None, [f"teacher.endpoints=['http://127.0.0.1:{free_port()}/v1']", "teacher.model=tiny"]
    )
    with pytest.raises(
        ConfigError, match=r"teacher: no client for its servers, got .*correct HTTPS_PROXY"
    ):
        open_pool(config.teacher, SingleProcess())


def test_what_the_student_waits_for_does_not_queue_behind_answers() -> None:
    def plan(number: int) -> Say:
        def slow(connection: socket.socket) -> None:
            time.sleep(5.0)
            GOOD(connection)

        return slow if number < 4 else GOOD

    with serve_raw(plan) as server:
        pool = EndpointPool([server.url], "tiny", TeacherConfig(max_concurrency=4))
        answers = pool.submit([ASK] * 8, PATIENT)
        while len(server.requests) < 4:
            time.sleep(0.01)
        (urgent,) = pool.submit(
            [ASK], Patience(max_seconds=4.0, num_retries=0, is_urgent=True)
        ).result(timeout=60)
        assert texts(urgent) == ["3", "4"]
        assert not answers.done()
        assert all(texts(outcome) == ["3", "4"] for outcome in answers.result(timeout=60))
        pool.close()

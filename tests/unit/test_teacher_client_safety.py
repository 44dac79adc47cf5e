"""What a server cannot do to a client: redirect, forge replies, set cookies, learn the key."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support.pool_asking import ASK, GOOD, KEY, PATIENT, ask, faults, texts
from tests.support.raw_server import Say, completion, http, say, serve_raw
from tests.support.running import free_port
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.pool import EndpointPool

pytestmark = pytest.mark.timeout(120)


def test_redirects_are_not_followed() -> None:
    with (
        serve_raw(lambda number: GOOD) as other,
        serve_raw(
            lambda number: say(
                http(b"", f"Location: {other.url}/chat/completions", status="307 Moved")
            )
        ) as server,
    ):
        outcome, _ = ask(server.url, RetryPolicy(max_seconds=60.0, num_retries=0), api_key=KEY)
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
            RetryPolicy(max_seconds=60.0, num_retries=0),
            api_key=KEY,
        )
    assert all(f"Authorization: Bearer {KEY}".encode() in head for head, _ in server.requests)
    assert texts(outcome) == ["Your key is ***", "4"]
    shown = "\n".join([caplog.text, outcome.problem, refused.problem, repr(outcome), repr(refused)])
    assert KEY not in shown
    assert "***" in caplog.text
    assert "\x1b" not in caplog.text


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
        outcome, counts = ask(server.url, RetryPolicy(max_seconds=60.0, num_retries=0), api_key=KEY)
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
        ask("https://teacher.invalid/v1", RetryPolicy(max_seconds=60.0, num_retries=0), api_key=KEY)
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


@pytest.mark.medium
def test_what_the_student_waits_for_does_not_queue_behind_answers() -> None:
    go = threading.Event()

    def plan(number: int) -> Say:
        def slow(connection: socket.socket) -> None:
            go.wait()
            GOOD(connection)

        return slow if number < 4 else GOOD

    with serve_raw(plan) as server:
        pool = EndpointPool([server.url], "tiny", TeacherConfig(max_concurrency=4))
        answers = pool.submit([ASK] * 8, PATIENT)
        while len(server.requests) < 4:
            time.sleep(0.01)
        (urgent,) = pool.submit(
            [ASK], RetryPolicy(max_seconds=60.0, num_retries=0, is_urgent=True)
        ).result(timeout=60)
        assert texts(urgent) == ["3", "4"]
        assert not answers.done()
        go.set()
        assert all(texts(outcome) == ["3", "4"] for outcome in answers.result(timeout=60))
        pool.close()

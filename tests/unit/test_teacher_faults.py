"""The way to the servers under faults: a real tiny model behind real HTTP, and a proxy that spoils
replies.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import FAULTS, PASS, FaultProxy, stand_between
from tests.support.loopback_server import LoopbackServer, TinyModel, serve
from tests.support.running import free_port
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.serving.api_key import read_key
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.servers import Outcome

KEY = "sk-0123456789abcdef"
COUNTED_AS = {
    "reset": "cut_off", "500": "http_500", "429": "http_429", "503": "http_503",
    "half_body": "cut_off", "wrong_json": "bad_reply",
    "not_a_completion": "bad_reply", "empty_choice": "empty_choice", "no_choice": "empty_choice",
    "stall": "timeout",
}  # fmt: skip
LONG = RetryPolicy(max_seconds=200.0, num_retries=None)


def settings(**changes: Any) -> TeacherConfig:
    fast = {
        "connect_timeout_seconds": 2.0,
        "read_timeout_seconds": 30.0,
        "request_timeout_seconds": 30.0,
        "backoff_seconds": 0.01,
    }
    return TeacherConfig(**{**fast, **changes})


def asks(count: int, num_choices: int = 2) -> list[ChatRequest]:
    return [ChatRequest(f"What is {i} + 1?", num_choices, 1.0, 4, 10 * i) for i in range(count)]


def ask_all(
    urls: Sequence[str], requests: Sequence[ChatRequest], policy: RetryPolicy = LONG, **options: Any
) -> tuple[list[Outcome], Counter[str]]:
    config = options.pop("config", settings())
    pool = EndpointPool(urls, "tiny", config, **options)
    try:
        return pool.submit(requests, policy).result(timeout=250), pool.counts
    finally:
        pool.close()


def texts(outcomes: Sequence[Outcome]) -> list[list[str]]:
    return [[choice.text for choice in outcome.answers()] for outcome in outcomes]


def test_every_answer_comes_in_order_and_tokens_are_counted(server: LoopbackServer) -> None:
    outcomes, counts = ask_all([server.url], asks(3, 4))
    assert [sorted(outcome.choices) for outcome in outcomes] == [[0, 1, 2, 3]] * 3
    assert [outcome.problem for outcome in outcomes] == ["", "", ""]
    asked = {request["seed"]: request["messages"][0]["content"] for request in server.requests}
    assert asked == {10 * i: f"What is {i} + 1?" for i in range(3)}
    sent = {
        int(name.split("-")[2]): reply for name, reply in server.replies.items()
    }  # in whatever order they were answered
    assert texts(outcomes) == [sent[10 * i] for i in range(3)]
    assert {choice.finish_reason for outcome in outcomes for choice in outcome.answers()} <= {
        "stop",
        "length",
    }
    assert counts["requests"] == 3
    assert counts["completion_tokens"] >= 12
    assert counts["prompt_tokens"] > 0
    assert set(counts) == {"requests", "prompt_tokens", "completion_tokens"}
    assert texts(ask_all([server.url], asks(3, 4))[0]) == texts(outcomes)  # seeded


def test_a_server_without_n_is_asked_for_each_answer_with_a_seed_of_its_own(
    tiny_model: TinyModel,
) -> None:
    with serve(tiny_model, honours_n=False) as server:
        pool = EndpointPool([server.url], "tiny", settings())
        first = pool.submit(asks(1, 3), LONG).result(timeout=100)
        assert [request.get("n", 1) for request in server.requests] == [3, 1, 1]
        assert sorted(request["seed"] for request in server.requests) == [0, 1, 2]
        second = pool.submit(asks(2, 3), LONG).result(timeout=100)
        pool.close()
        assert [request.get("n", 1) for request in server.requests[3:]] == [1] * 6  # it learned
    assert [len(outcome.answers()) for outcome in [*first, *second]] == [3, 3, 3]
    assert texts(second)[0] == texts(first)[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_of_each_kind_is_survived_and_counted(server: LoopbackServer, fault: str) -> None:
    with stand_between(server.url, lambda number: fault if number == 0 else PASS) as proxy:
        proxy.stall_seconds = 5.0
        config = settings(read_timeout_seconds=3.0) if fault == "stall" else settings()
        server_is_slow = fault == "stall"
        retries = 20 if server_is_slow else 1
        (outcome,), counts = ask_all(
            [proxy.url], asks(1), RetryPolicy(max_seconds=60, num_retries=retries), config=config
        )
        assert len(outcome.answers()) == 2
        assert outcome.problem == ""
        assert counts[f"faults/{COUNTED_AS[fault]}"] >= 1
        assert texts([outcome]) == list(proxy.delivered.values())[-1:]
        if not server_is_slow:
            assert counts["retries"] == 1


@pytest.mark.medium
def test_a_thousand_faults_lose_no_rollout_and_count_none_twice(server: LoopbackServer) -> None:
    rare = {"stall": 8, "half_body": 40}  # the ones that take time
    often = [fault for fault in FAULTS if fault not in rare]
    plan = [fault for fault, count in rare.items() for _ in range(count)]
    plan += itertools.islice(itertools.cycle(often), 1000 - len(plan))
    draw = random.Random(0)
    draw.shuffle(plan)
    faults = iter(plan)
    # Of a hundred requests four are let through, until a thousand were spoilt.
    kinds = [PASS if draw.random() < 0.04 else next(faults, PASS) for _ in range(2000)]
    with stand_between(server.url, lambda number: kinds[number]) as proxy:
        proxy.stall_seconds, proxy.retry_after = 31.0, "0.01"
        config = settings(
            read_timeout_seconds=30.0, backoff_seconds=0.0, max_concurrency=8, num_retries=1000
        )
        outcomes, counts = ask_all([proxy.url], asks(60, 2), config=config)
    assert [sorted(outcome.choices) for outcome in outcomes] == [[0, 1]] * 60
    assert proxy.injected == Counter(plan)
    assert sum(count for name, count in counts.items() if name.startswith("faults/")) == 1000
    # A few questions are answered one by one, after two replies that may mean that the server does
    # not give several.
    assert counts["requests"] - len(proxy.delivered) == 1000 >= counts["retries"] > 900
    # Every reply that came through whole was used, and nothing else.
    assert sorted(itertools.chain(*texts(outcomes))) == sorted(
        itertools.chain(*proxy.delivered.values())
    )


def test_a_server_that_is_not_there(server: LoopbackServer) -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    outcomes, counts = ask_all([dead, server.url], asks(4))
    assert [len(outcome.answers()) for outcome in outcomes] == [2] * 4
    assert counts["faults/connection"] >= 1
    (lost,), counts = ask_all([dead], asks(1), RetryPolicy(max_seconds=60, num_retries=2))
    assert lost.answers() == []
    assert lost.problem.startswith("connection: ")
    assert not lost.is_refused
    assert (counts["requests"], counts["retries"]) == (3, 2)
    (late,), _ = ask_all([dead], asks(1), RetryPolicy(max_seconds=0.5, num_retries=None))
    assert late.problem.startswith("not answered within 0.5 s, last connection: ")


def test_some_of_the_answers_are_kept_when_others_fail(tiny_model: TinyModel) -> None:
    with (
        serve(tiny_model, honours_n=False) as server,
        stand_between(server.url, lambda number: PASS if number < 2 else "500") as proxy,
    ):
        (outcome,), _ = ask_all([proxy.url], asks(1, 4), RetryPolicy(max_seconds=60, num_retries=1))
        assert len(outcome.answers()) == 2
        assert texts([outcome])[0] == [text for reply in proxy.delivered.values() for text in reply]
        assert outcome.problem.startswith("http_500: ")
        assert not outcome.is_refused


def test_a_refused_message_is_not_sent_again(server: LoopbackServer) -> None:
    with stand_between(server.url, lambda number: "400") as proxy:
        (outcome,), counts = ask_all([proxy.url], asks(1, 1))
        (several,), more = ask_all([proxy.url], asks(1, 2))
    assert outcome.is_refused
    assert several.is_refused
    assert (counts["requests"], more["requests"]) == (
        1,
        2,
    )  # several answers may be what is refused


def test_retry_after_is_kept(server: LoopbackServer) -> None:
    with stand_between(server.url, lambda number: "429" if number == 0 else PASS) as proxy:
        proxy.retry_after = "1.5"
        started = time.monotonic()
        ask_all([proxy.url], asks(1))
        assert time.monotonic() - started >= 1.5


def test_requests_are_bounded_and_shared_by_the_servers(tiny_model: TinyModel) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(tiny_model)) for _ in range(2)]
        proxies: list[FaultProxy] = [
            stack.enter_context(stand_between(server.url, lambda number: PASS))
            for server in servers
        ]
        outcomes, _ = ask_all([proxy.url for proxy in proxies], asks(12, 1), max_concurrency=3)
        assert [len(outcome.answers()) for outcome in outcomes] == [1] * 12
        assert [proxy.most_at_once for proxy in proxies] == [3, 3]
        assert all(proxy.num_requests >= 3 for proxy in proxies)


def test_a_wrong_key_is_named_at_once_and_shown_nowhere(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.api_key = "another"
    monkeypatch.setenv("TEACHER_KEY", KEY)
    config = load_config(
        None,
        [
            f"teacher.endpoints=['{server.url}']",
            "teacher.model=tiny",
            "teacher.api_key_env=TEACHER_KEY",
        ],
    )
    with (
        caplog.at_level("DEBUG"),
        pytest.raises(
            ConfigError, match=r"refuses the model 'tiny', got 'http_401.*wrong key Bearer \*\*\*"
        ) as caught,
    ):
        open_pool(config.teacher, SingleProcess())
    assert KEY not in str(caught.value)
    assert KEY not in caplog.text
    server.api_key = KEY
    pool = open_pool(config.teacher, SingleProcess())
    assert pool is not None
    assert KEY not in repr(vars(pool))
    assert KEY not in Path(f"/proc/{vars(pool)['_worker'].process.pid}/cmdline").read_text()
    pool.close()


@pytest.mark.parametrize("key", ["sk-0123\n", "sk 0123", "sk-\u00e9"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(
        ConfigError, match=r"teacher\.api_key_env: the key in TEACHER_KEY has a space"
    ) as caught:
        read_key("TEACHER_KEY")
    assert key.strip() not in str(caught.value)


def test_a_wrong_model_and_a_server_not_yet_there(
    server: LoopbackServer, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"teacher.endpoints=['{server.url}']", "teacher.model=other"]
    with pytest.raises(ConfigError, match=r"refuses the model 'other', got 'http_404"):
        open_pool(load_config(None, options).teacher, SingleProcess())
    assert open_pool(load_config(None, []).teacher, SingleProcess()) is None
    options = [f"teacher.endpoints=['http://127.0.0.1:{free_port()}/v1']", "teacher.model=tiny"]
    pool = open_pool(load_config(None, options).teacher, SingleProcess())
    assert pool is not None
    pool.close()
    assert "does not answer yet: connection" in caplog.text


def test_closing_drops_what_is_in_flight(server: LoopbackServer) -> None:
    server.latency_seconds = 30.0
    pool = EndpointPool([server.url], "tiny", settings())
    num_before = len(server.requests)
    future = pool.submit(asks(1), LONG)
    while len(server.requests) == num_before:
        time.sleep(0.01)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < server.latency_seconds - 5
    assert future.done()
    server.latency_seconds = 0.0

"""The pool in a process of its own: the same answers as in ours, and what happens when either
process ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.media.opening import MediaLimits
from data.media.store import MediaStore
from data.question import Question
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.toy.digits_shards import digit_samples
from tests.support.loopback_server import LoopbackServer, TinyModel, serve
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.pool_settings import PoolSettings

LONG = RetryPolicy(max_seconds=200.0, num_retries=None)
CONFIG = TeacherConfig(backoff_seconds=0.01)


@contextmanager
def process(url: str, **options: Any) -> Iterator[PoolProcess]:
    pool = PoolProcess(PoolSettings(urls=(url,), model="tiny", config=CONFIG, **options))
    try:
        yield pool
    finally:
        pool.close()


def asks(count: int) -> list[ChatRequest]:
    return [ChatRequest(f"What is {i} + 1?", 3, 1.0, 6, 10 * i) for i in range(count)]


def pid(pool: PoolProcess) -> int:
    return int(vars(pool)["_worker"].process.pid)


def test_answers_and_counts_are_those_of_a_pool_in_this_process(server: LoopbackServer) -> None:
    inside = EndpointPool([server.url], "tiny", CONFIG)
    with process(server.url) as apart:
        expected, given = (
            pool.submit(asks(4), LONG).result(timeout=200) for pool in (inside, apart)
        )
        more = apart.submit(asks(1), LONG).result(timeout=200)
    inside.submit(asks(1), LONG).result(timeout=200)
    inside.close()
    assert [outcome.choices for outcome in given] == [outcome.choices for outcome in expected]
    assert more[0].choices == given[0].choices
    assert apart.counts == inside.counts
    assert apart.counts["requests"] == 5


@pytest.mark.medium
def test_media_are_opened_there(server: LoopbackServer, tmp_path: Path) -> None:
    write_shards(tmp_path, digit_samples("video", "train", 2, 3))
    folder = ShardFolder(tmp_path)
    questions: list[Question] = [folder.question(shard, key) for shard, key in list(folder.keys())]
    media = MediaStore(MediaLimits())
    wanted = [
        ChatRequest("Which digits?", 1, 0.0, 24, 0, media=question.media) for question in questions
    ]
    inside = EndpointPool([server.url], "tiny", CONFIG, media=media)
    lost = replace(wanted[0], media=(replace(questions[0].media[0], extension="gone"),))
    with process(server.url, limits=MediaLimits()) as apart:
        expected, given = (
            pool.submit([*wanted, lost], LONG).result(timeout=200) for pool in (inside, apart)
        )
        sent = [request["messages"][0]["content"] for request in server.requests]
        gone = [
            replace(
                wanted[0], media=(replace(questions[0].media[0], shard=str(tmp_path / "gone.tar")),)
            )
        ]
        with pytest.raises(DataError, match=r"gone\.tar"):
            apart.submit(gone, LONG).result(timeout=200)
    inside.close()
    media.close()
    assert [outcome.choices for outcome in given] == [outcome.choices for outcome in expected]
    assert [outcome.is_refused for outcome in given] == [False, False, True]
    assert given[2].problem == expected[2].problem
    assert sorted(map(str, sent[:2])) == sorted(map(str, sent[2:]))
    assert all(any(part["type"] == "image_url" for part in content) for content in sent)


def test_what_a_dead_process_was_asked_is_counted_and_the_next_question_starts_a_new_one(
    server: LoopbackServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"), process(server.url) as pool:
        (before,) = pool.submit(asks(1), LONG).result(timeout=200)
        first = pid(pool)
        server.latency_seconds = 30.0
        pending = pool.submit(asks(2), LONG)
        os.kill(first, signal.SIGKILL)
        outcomes = pending.result(timeout=200)
        assert [(outcome.choices, outcome.is_refused) for outcome in outcomes] == [({}, False)] * 2
        assert "ended by SIGKILL" in outcomes[0].problem
        assert pool.counts["faults/client_process"] == 2
        server.latency_seconds = 0.0
        (after,) = pool.submit(asks(1), LONG).result(timeout=200)
        assert pid(pool) != first
    assert after.choices == before.choices
    assert "ended by SIGKILL; 2 questions are lost" in caplog.text


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_signals_to_all_processes_of_a_run_do_not_end_it(
    server: LoopbackServer, seconds: float
) -> None:
    server.latency_seconds = 3.0
    with process(server.url) as pool:
        pending = pool.submit(asks(1), LONG)
        time.sleep(seconds)  # while it starts, or waits for the answer
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGUSR1,
            signal.SIGUSR2,
        ):
            os.kill(pid(pool), number)
        (outcome,) = pending.result(timeout=200)
    assert outcome.problem == ""
    assert len(outcome.answers()) == 3


def test_closing_drops_what_is_in_flight(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo_mm.serving.client_process.CLOSING_SECONDS", 60.0)
    server.latency_seconds = 30.0
    with process(server.url) as pool:
        num_before = len(server.requests)
        pending = pool.submit(asks(1), LONG)
        while len(server.requests) == num_before:
            time.sleep(0.01)
        child = vars(pool)["_worker"].process
        pool.close()
        assert child.returncode == 0  # asked to stop, not killed
        assert pending.cancelled()
        assert not is_running(child.pid)
    server.latency_seconds = 0.0


def test_it_ends_with_the_process_that_started_it(server: LoopbackServer) -> None:
    server.latency_seconds = 60.0
    script = f"""
import os
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.teacher.served.pool_settings import PoolSettings
from zppo_mm.serving.client_process import PoolProcess
pool = PoolProcess(PoolSettings(urls=({server.url!r},), model="tiny", config=TeacherConfig()))
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.serving.servers import RetryPolicy
pool.submit([ChatRequest("Hi", 1, 0.0, 4, 0)], RetryPolicy(max_seconds=100.0, num_retries=None))
import time; time.sleep(3)
print(vars(pool)["_worker"].process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, check=False, timeout=100
    )
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while is_running(int(ended.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(ended.stdout))
    server.latency_seconds = 0.0


def is_running(number: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{number}/stat").read_text()
    except FileNotFoundError:
        return False


def test_what_it_cannot_send_ends_it(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that cannot be sent must not leave its holder waiting."""
    (tmp_path / "client_without_pickle.py").write_text(
        """
from zppo_mm.serving import client_main
class Unsendable(Exception):
    def __reduce__(self):
        raise TypeError("no pickle")
client_main.Done = lambda *arguments: Unsendable()
client_main.main()
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("zppo_mm.serving.client_process._MODULE", "client_without_pickle")
    with process(server.url) as pool:
        (outcome,) = pool.submit(asks(1), LONG).result(timeout=100)
    assert "exit status 1" in outcome.problem


def test_it_starts_without_torch() -> None:
    script = (
        "import sys, zppo_mm.serving.client_main, zppo_mm.teacher.served.pool_settings; "
        "print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=100) == "[]\n"


def test_what_it_logs_is_received_here(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO", logger="zppo_mm"),
        serve(tiny_model, honours_n=False) as server,
        process(server.url) as pool,
    ):
        pool.submit(asks(1), LONG).result(timeout=200)
    assert "returns one answer per request" in caplog.text


def test_a_process_that_does_not_start_is_an_error_with_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zppo_mm.serving.client_process._MODULE", "zppo_mm.no_such_module")
    with (
        process("http://127.0.0.1:9/v1") as pool,
        pytest.raises(RuntimeError, match="ended with exit status 1"),
    ):
        pool.probe().result(timeout=100)


def test_one_that_hangs_is_ended_and_what_it_was_asked_is_counted(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo_mm.serving.client_process.OVERDUE_SECONDS", 5.0)
    with process(server.url) as pool:
        pool.submit(asks(1), LONG).result(timeout=200)
        first = pid(pool)
        os.kill(first, signal.SIGSTOP)
        outcomes = pool.submit(asks(2), RetryPolicy(max_seconds=0.1, num_retries=0)).result(
            timeout=60
        )
        assert [outcome.problem for outcome in outcomes] == [
            "client_process: the process here that speaks with the servers did not answer in time, "
            "ended by SIGKILL"
        ] * 2
        assert pool.counts["faults/client_process"] == 2
        (after,) = pool.submit(asks(1), LONG).result(timeout=200)
        assert len(after.answers()) == 3
        assert pid(pool) != first

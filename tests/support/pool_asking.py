"""Asks a pool one question, for tests of servers that misbehave; a teacher behind a pool."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tests.support.raw_server import completion, http, say
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.servers import Outcome, Servers
from zppo_mm.teacher.served.teacher import ServedTeacher
from zppo_mm.teacher.served.tokens import TokenReader
from zppo_mm.zone.prompts import load_templates

KEY = "sk-0123456789abcdef"
ASK = ChatRequest("What is 3 + 1?", 2, 1.0, 16, 0)
GOOD = say(http(completion("3", "4")))
PATIENT = RetryPolicy(max_seconds=60.0, num_retries=3)


def ask(url: str, policy: RetryPolicy = PATIENT, **options: Any) -> tuple[Outcome, Counter[str]]:
    times = {
        "connect_timeout_seconds": 2.0,
        "read_timeout_seconds": 2.0,
        "request_timeout_seconds": 3.0,
        "backoff_seconds": 0.01,
    }
    config = TeacherConfig(**{**times, **options.pop("config", {})})
    pool = EndpointPool([url], "tiny", config, **options)
    try:
        (outcome,) = pool.submit([ASK], policy).result(timeout=100)
        return outcome, pool.counts
    finally:
        pool.close()


def served_teacher(
    pool: Servers,
    config: TeacherConfig,
    verifier: Verifier,
    encoder: PromptEncoder,
    tokens: TokenReader | None = None,
) -> ServedTeacher:
    """Return the teacher of a run of one process, whose student has the encoder's tokenizer."""
    return ServedTeacher(
        pool,
        config,
        SingleProcess(),
        verifier,
        plain_text=load_templates().plain_text,
        tokenize=lambda text: encoder.chat.tokenize([text]),
        seed=0,
        tokens=tokens,
    )


def texts(outcome: Outcome) -> list[str]:
    return [choice.text for choice in outcome.answers()]


def faults(counts: Counter[str]) -> dict[str, int]:
    return {
        name.removeprefix("faults/"): count
        for name, count in counts.items()
        if name.startswith("faults/")
    }


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

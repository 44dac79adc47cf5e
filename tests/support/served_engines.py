"""An engine that asks servers of a table of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from encoders.config import TIMESTAMPED
from tests.support.vllm_server import FakeVllm
from zppo_mm.experience import Prompt
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.served.engine import GenerateServers, ServedModel, VllmEngine
from zppo_mm.rollout.served.features import MediaReading
from zppo_mm.rollout.served.pool import GeneratePool, Limits
from zppo_mm.serving.servers import RetryPolicy

PATIENT = RetryPolicy(max_seconds=60.0, num_retries=None)
LIMITS = Limits(
    connect_timeout_seconds=2.0,
    read_timeout_seconds=2.0,
    request_timeout_seconds=5.0,
    num_retries=0,
    backoff_seconds=0.01,
    max_concurrency=8,
)
MANY = replace(LIMITS, max_concurrency=32, backoff_seconds=1e-4)
RUN = "run"
TABLE_MODEL = ServedModel(
    vocabulary=40, reading=MediaReading((7, 9), None, TIMESTAMPED), run=RUN, seed=0, context=9
)
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=6, stop_token_ids=(3,))


class Relabelled:
    """Gives servers the version of weights that they have already. Implements `WeightSender`."""

    def __init__(self, *servers: FakeVllm) -> None:
        self.servers = servers
        self.pushed: list[int] = []
        self.is_closed = False
        self.counts = {"bytes": 0.0}

    def push(self, version: int) -> None:
        self.pushed.append(version)
        for server in self.servers:
            server.version = f"{RUN}/{version}"

    def close(self) -> None:
        self.is_closed = True


@contextmanager
def engine_of(
    *servers: FakeVllm,
    weights: Any = None,
    policy: RetryPolicy = PATIENT,
    pool: GenerateServers | None = None,
    model: ServedModel = TABLE_MODEL,
    limits: Limits = LIMITS,
    **options: Any,
) -> Iterator[VllmEngine]:
    """Yield an engine whose servers have the weights of version 1."""
    pool = pool or GeneratePool([server.url for server in servers], limits)
    weights = weights or Relabelled(*servers)
    engine = VllmEngine(pool, model, SingleProcess(), policy, weights, **options)
    engine.update_weights(1)
    try:
        yield engine
    finally:
        engine.close()


def table_requests(count: int, num_rollouts: int = 3) -> list[GenerationRequest]:
    def prompt(index: int) -> Prompt:
        ids = np.array([10 + index % 20, 11, 12 + index % 7])
        return Prompt("", ids, np.tile(np.arange(3), (3, 1)), 3)

    return [
        GenerationRequest(prompt(index), (), num_rollouts, ("rollout", f"q{index}"))
        for index in range(count)
    ]


def ids_of(groups: Sequence[Sequence[Any]]) -> list[list[list[int]]]:
    return [[each.response_ids.tolist() for each in group] for group in groups]

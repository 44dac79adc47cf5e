"""The engine that asks vLLM servers on two ranks: of a replica one asks and both get the same;
servers that one replica loses, and a stop that one rank knows of, are everybody's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data.media.opening import Frames
from data.question import MediaRef
from encoders.config import TIMESTAMPED
from tests.support import network_checks
from tests.support.drawing_students import TableStudent
from tests.support.launch import run_ranks
from tests.support.vllm_server import serve_vllm
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import RolloutServersLostError
from zppo_mm.experience import Prompt
from zppo_mm.interruption import StopRequested
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange, SingleProcess
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.served.engine import ServedModel, VllmEngine
from zppo_mm.rollout.served.features import MediaReading
from zppo_mm.rollout.served.pool import GeneratePool, GeneratePoolSettings, Limits
from zppo_mm.run.served_engine import open_served_engine
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.serving.servers import RetryPolicy

pytestmark = pytest.mark.timeout(700)  # a start of two ranks takes a minute on a busy machine
LIMITS = Limits(
    connect_timeout_seconds=5.0,
    read_timeout_seconds=30.0,
    request_timeout_seconds=30.0,
    num_retries=0,
    backoff_seconds=0.05,
    max_concurrency=8,
)
MODEL = ServedModel(
    vocabulary=40, reading=MediaReading((7, 9), None, TIMESTAMPED), run="", seed=0, context=100
)
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=6, stop_token_ids=(3,))
NOBODY = "http://127.0.0.1:9"


def requests(count: int) -> list[GenerationRequest]:
    prompt = Prompt("", np.array([10, 11, 12]), np.tile(np.arange(3), (3, 1)), 3)
    return [GenerationRequest(prompt, (), 2, ("rollout", f"q{index}")) for index in range(count)]


def engine(exchange: ParallelExchange, url: str, max_seconds: float = 60.0) -> VllmEngine:
    pool = PoolProcess(GeneratePoolSettings(urls=(url,), limits=LIMITS))
    policy = RetryPolicy(max_seconds=max_seconds, num_retries=None)
    return VllmEngine(pool, MODEL, exchange, policy, should_stop=exchange.should_stop)


def sample_on_two_ranks(url: str, tensor: int) -> dict[str, Any]:
    """Run on every rank: a call that is answered, one that is not on the first replica, and one in
    which the last rank is to stop.
    """
    parallel.initialize(ParallelConfig(tensor_model_parallel_size=tensor), seed=0)
    exchange = ParallelExchange()
    own = requests(6)[exchange.replica :: exchange.num_replicas]
    results: dict[str, Any] = {"replica": exchange.replica, "leader": exchange.is_leader}
    answered = engine(exchange, url)
    results["ids"] = [
        [each.response_ids.tolist() for each in group] for group in answered.generate(own, SAMPLING)
    ]
    results["requests"] = answered.counts.get("requests", 0)
    answered.close()
    lost = engine(exchange, NOBODY if exchange.replica == 0 else url, max_seconds=1.0)
    try:
        lost.generate(own, SAMPLING)
    except RolloutServersLostError as error:
        results["lost"] = str(error)
    lost.close()
    stopping = ParallelExchange(should_stop=lambda: parallel.rank() == parallel.world_size() - 1)
    stopped = engine(stopping, url)
    try:
        stopped.generate(own, SAMPLING)
    except StopRequested:
        results["stopped"] = True
    stopped.close()
    results["push"] = stop_in_a_push(ParallelConfig(tensor_model_parallel_size=tensor))
    parallel.shutdown()
    return results


def stop_in_a_push(layout: ParallelConfig) -> str:
    """Rank 0 alone knows that the run is to end, when the first weights are sent."""
    config = load_config(None, ["rollout.engine=vllm", f"rollout.endpoints=[{NOBODY}]"])
    opened = open_served_engine(
        config,
        ParallelExchange(should_stop=lambda: parallel.rank() == 0),
        network_checks.build(STUDENT_DIR, layout),
        STUDENT_DIR,
        PromptEncoder(STUDENT_DIR, no_media),
        None,
    )
    assert opened is not None
    try:
        opened.update_weights(1)
    except StopRequested:
        return "stopped"
    finally:
        opened.close()
    return "sent"


def no_media(reference: MediaRef) -> Frames:
    raise NotImplementedError("no prompt has media")


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_ranks_agree(tensor: int) -> None:
    with serve_vllm(TableStudent()) as server:
        ranks = run_ranks(sample_on_two_ranks, 2, server.url, tensor)
        alone = GeneratePool([server.url], LIMITS)
        policy = RetryPolicy(max_seconds=60.0, num_retries=None)
        expected = [
            [each.response_ids.tolist() for each in group]
            for group in VllmEngine(alone, MODEL, SingleProcess(), policy).generate(
                requests(6), SAMPLING
            )
        ]
        alone.close()
    num_replicas = 2 // tensor
    for rank in ranks:
        assert rank["ids"] == expected[rank["replica"] :: num_replicas]
        assert rank["requests"] == (6 // num_replicas if rank["leader"] else 0)
        assert "prompts were not continued" in rank["lost"]
        assert rank["stopped"]
        assert rank["push"] == "stopped"
    assert sum(rank["leader"] for rank in ranks) == num_replicas

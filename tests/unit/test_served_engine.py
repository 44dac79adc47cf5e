"""The engine that asks vLLM servers: against the engine of the training network, and against
servers that fail.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.drawing_students import Asked, Logits, TableStudent, TransformersStudent
from tests.support.running import free_port
from tests.support.served_engines import (
    LIMITS,
    MANY,
    RUN,
    SAMPLING,
    Relabelled,
    engine_of,
    ids_of,
    table_requests,
)
from tests.support.vllm_replies import FAULTS, PASS
from tests.support.vllm_server import FakeVllm, serve_vllm
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import RolloutServersLostError
from zppo_mm.interruption import StopRequested
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parity.oracle import SourceInput, model_inputs
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.served.engine import VllmEngine
from zppo_mm.rollout.served.pool import GeneratePool, GeneratePoolSettings
from zppo_mm.run.served_engine import served_model
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = pytest.mark.usefixtures("one_rank")
# Decoding and transformers sum the same float32 products in other orders.
TOLERANCE = 1e-4
FAULTY = 0.6
QUESTIONS: dict[str, tuple[str, ...]] = {
    "text": (),
    "image": ("image",),
    "video": ("video",),
    "mixed": ("image", "video", "image"),
}


def open_media(reference: MediaRef) -> Frames:
    rng = np.random.default_rng(len(reference.key))
    frames, seconds = (1, (0.0,)) if reference.kind == "image" else (5, (0.0, 0.5, 1.0, 1.5, 2.0))
    return Frames(rng.integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8), seconds)


@pytest.fixture(scope="module")
def student() -> TransformersStudent:
    return TransformersStudent(STUDENT_DIR)


def test_it_samples_what_the_training_network_samples(student: TransformersStudent) -> None:
    """Text, image, video and all of them: the same greedy tokens as the Megatron engine with its
    log-probs, and at a temperature the log-probs of transformers' forward pass.
    """
    encoder = PromptEncoder(STUDENT_DIR, open_media)
    architecture = load_architecture(STUDENT_DIR)
    requests = []
    for name, kinds in QUESTIONS.items():
        media = tuple(MediaRef(kind, "", "k" * (at + 1), "x") for at, kind in enumerate(kinds))  # type: ignore[arg-type]
        prompt, vision = encoder.encode(name, Question(name, name, media, "1", "open"))
        requests.append(GenerationRequest(prompt, vision, 2, ("rollout", name)))
    network = build_model(
        architecture,
        ModelConfig(transformer_impl="local", params_dtype="float32"),
        ParallelConfig(),
    )
    load_hf_weights(network, STUDENT_DIR)
    greedy, warm = (
        SamplingParams(
            temperature=temperature, max_new_tokens=8, stop_token_ids=encoder.stop_token_ids
        )
        for temperature in (0.0, 0.7)
    )
    expected = MegatronEngine(network, seed=0).generate(requests, greedy)
    model = served_model(architecture, encoder, seed=0, run=RUN, context=2048)
    with serve_vllm(student) as server, engine_of(server, model=model) as engine:
        same = engine.generate(requests, greedy)
        drawn = engine.generate(requests, warm)
    assert ids_of(same) == ids_of(expected)
    for group, others in zip(same, expected, strict=True):
        for one, other in zip(group, others, strict=True):
            np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=TOLERANCE)
            assert one.finish_reason == other.finish_reason
    for request, group in zip(requests, drawn, strict=True):
        for each in group:
            naive = forward_logprobs(student.network, request, each.response_ids, 0.7)
            np.testing.assert_allclose(each.rollout_logprobs, naive, atol=TOLERANCE)


def forward_logprobs(
    network: Any, request: GenerationRequest, response_ids: Any, temperature: float
) -> Any:
    prompt = request.prompt.continued(response_ids)
    source = SourceInput(prompt.token_ids, prompt.positions, len(response_ids), request.vision)
    with torch.inference_mode():
        logits = network(**model_inputs(network.config, source)).logits[0].float()
    before = logits[-len(response_ids) - 1 : -1] / temperature
    ids = torch.from_numpy(response_ids)[:, None]
    return torch.log_softmax(before, -1).gather(1, ids)[:, 0].numpy()


def test_draws_follow_from_seed_and_path_alone() -> None:
    """Not from what else is asked, from the number of servers, or from retries."""
    requests = table_requests(6)
    with serve_vllm(TableStudent()) as one, engine_of(one) as engine:
        expected = ids_of(engine.generate(requests, SAMPLING))
        alone = [ids_of(engine.generate([each], SAMPLING))[0] for each in requests[:2]]
    assert alone == expected[:2]
    with (
        serve_vllm(TableStudent(), plan=lambda number: ["500", PASS][number % 2]) as one,
        serve_vllm(TableStudent()) as two,
        engine_of(one, two) as engine,
    ):
        assert ids_of(engine.generate(requests, SAMPLING)) == expected
    assert len({tuple(map(tuple, group)) for group in expected}) == 6


def test_500_faults_lose_and_double_no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of fault at two servers: every group arrives once, whole, as it was sent."""
    monkeypatch.setattr("zppo_mm.rollout.served.replies.PAUSE_SECONDS", 0.01)
    rng = np.random.default_rng(0)
    quick = [fault for fault in FAULTS if fault != "stall"]

    def plan(number: int) -> str:
        if number == 5:
            return "stall"
        return quick[number % len(quick)] if rng.random() < FAULTY else PASS

    with (
        serve_vllm(TableStudent(), plan) as one,
        serve_vllm(TableStudent(), plan) as two,
        engine_of(
            pool=GeneratePool([one.url, two.url], MANY), weights=Relabelled(one, two)
        ) as engine,
    ):
        arrived: list[list[list[int]]] = []
        requests: list[GenerationRequest] = []
        while (one.injected + two.injected).total() < 500:
            asked = table_requests(len(requests) + 80)[len(requests) :]
            requests += asked
            arrived += ids_of(engine.generate(asked, SAMPLING))
        counts = engine.counts
        delivered = Counter(
            str(tokens) for server in (one, two) for _, _, tokens in server.delivered
        )
        sent = len(one.requests) + len(two.requests)
    assert len(arrived) == len(requests)
    assert all(len(group) == 3 for group in arrived)
    assert Counter(map(str, arrived)) == delivered
    with serve_vllm(TableStudent()) as calm, engine_of(calm) as engine:
        assert arrived == ids_of(engine.generate(requests, SAMPLING))
    num_faults = sum(count for name, count in counts.items() if name.startswith("faults/"))
    assert num_faults == (one.injected + two.injected).total() >= 500
    assert counts["requests"] == sent == num_faults + len(requests)
    assert counts["retries"] == num_faults
    assert counts["completion_tokens"] == sum(len(ids) for group in arrived for ids in group)
    assert set(one.injected + two.injected) == set(FAULTS)


def test_a_server_with_other_weights_is_left_alone_until_it_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was started again has none of the run's: its answers are dropped and counted."""
    monkeypatch.setattr("zppo_mm.rollout.served.replies.PAUSE_SECONDS", 0.05)
    with (
        serve_vllm(TableStudent()) as one,
        serve_vllm(TableStudent()) as two,
        engine_of(one, two, weights=Relabelled(one)) as engine,
    ):
        groups = engine.generate(table_requests(8), SAMPLING)
        assert {span.version for group in groups for each in group for span in each.versions} == {1}
        assert engine.counts["faults/other_weights"] == len(two.requests) > 0
        assert len(one.delivered) == 8
        # The next weights go to both.
        both = Relabelled(one, two)
        vars(engine)["_weights"] = both
        engine.update_weights(2)
        engine.update_weights(2)
        assert both.pushed == [2]
        refused = engine.counts["faults/other_weights"]
        num_before = len(two.delivered)
        while len(two.delivered) == num_before:
            engine.generate(table_requests(8), SAMPLING)
        assert {version for _, version, _ in two.delivered[num_before:]} == {"run/2"}
        assert engine.counts["faults/other_weights"] == refused


def test_partial_rollouts_go_on_with_new_weights() -> None:
    """Nothing waits; the spans say which weights drew."""
    with serve_vllm(TableStudent()) as server:
        server.is_open.clear()
        with engine_of(server, num_versions=2) as engine:
            pending = engine.start(table_requests(2), SAMPLING)
            while len(server.requests) < 2:
                time.sleep(0.01)
            engine.update_weights(2)
            server.is_open.set()
            groups = pending.wait()
            with pytest.raises(RolloutServersLostError, match="other_weights"):
                drop_late(engine, server)
    assert {span.version for group in groups for each in group for span in each.versions} == {2}


def drop_late(engine: VllmEngine, server: FakeVllm) -> None:
    """Ask with version 2, and let the servers have one that is too late."""
    vars(engine)["_policy"] = RetryPolicy(max_seconds=0.5, num_retries=None)
    server.version = f"{RUN}/4"
    engine.generate(table_requests(1), SAMPLING)


def test_lost_servers_end_the_run() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    pool = GeneratePool([nobody], LIMITS)
    hasty = RetryPolicy(max_seconds=0.5, num_retries=None)
    with (
        engine_of(pool=pool, policy=hasty) as engine,
        pytest.raises(
            RolloutServersLostError,
            match=r"2 of 2 prompts were not continued, got 'not answered within 0\.5 s, last "
            r"connection: .*rollout\.max_wait_seconds; look at the servers",
        ),
    ):
        engine.generate(table_requests(2), SAMPLING)


def test_a_server_that_refuses_a_prompt_is_named() -> None:
    with (
        serve_vllm(TableStudent(), plan=lambda number: "400") as server,
        engine_of(server) as engine,
        pytest.raises(RolloutServersLostError, match=r"http_400.*injected"),
    ):
        engine.generate(table_requests(1), SAMPLING)
    assert len(server.requests) == 1


def test_a_server_of_another_kind_or_age_is_named() -> None:
    with serve_vllm(TableStudent()) as server, engine_of(server) as engine:
        server.missing = {"/inference/v1/generate"}
        with pytest.raises(RolloutServersLostError, match=r"http_404.*vLLM of at least 0\.32"):
            engine.generate(table_requests(1), SAMPLING)


def test_a_refused_prompt_that_is_too_long_fails_alone() -> None:
    short, long = table_requests(1)[0], table_requests(1)[0]
    long = replace(long, prompt=long.prompt.continued([11]))
    with (
        serve_vllm(TableStudent(), plan=lambda number: "400" if number else PASS) as server,
        engine_of(server) as engine,
    ):
        (answered,) = engine.generate([short], SAMPLING)
        assert engine.generate([long], SAMPLING) == [[]]
    assert len(answered) == short.num_rollouts


class Cutting(TableStudent):
    """Takes 3 + 2 tokens."""

    def draw(self, asked: Asked) -> list[tuple[list[int], Logits]]:
        return super().draw(replace(asked, sampling={**asked.sampling, "max_tokens": 2}))


def test_a_response_that_the_server_cuts_ends_the_run_soon() -> None:
    with (
        serve_vllm(Cutting()) as server,
        engine_of(server) as engine,
        pytest.raises(RolloutServersLostError, match="--max-model-len may be too small"),
    ):
        engine.generate(table_requests(1), replace(SAMPLING, stop_token_ids=()))
    assert len(server.requests) == 1


def test_a_killed_server_gives_its_prompts_to_the_others() -> None:
    """In the middle of a call: what it was asked is asked elsewhere."""
    requests = table_requests(12)
    with serve_vllm(TableStudent()) as calm, engine_of(calm) as engine:
        expected = ids_of(engine.generate(requests, SAMPLING))
    with serve_vllm(TableStudent()) as one, serve_vllm(TableStudent()) as two:
        one.latency_seconds = two.latency_seconds = 0.2
        with engine_of(one, two) as engine:
            pending = engine.start(requests, SAMPLING)
            while not two.requests:
                time.sleep(0.01)
            two.shutdown()
            two.server_close()
            assert ids_of(pending.wait()) == expected
    assert len(one.delivered) >= 6


def test_the_client_process_may_die() -> None:
    """Its requests are asked again by another one."""
    with serve_vllm(TableStudent()) as server:
        pool = PoolProcess(GeneratePoolSettings(urls=(server.url,), limits=LIMITS))
        server.latency_seconds = 1.0
        with engine_of(server, pool=pool) as engine:
            pending = engine.start(table_requests(3), SAMPLING)
            while not server.requests:
                time.sleep(0.01)
            os.kill(vars(pool)["_worker"].process.pid, signal.SIGKILL)
            groups = pending.wait()
            assert [len(group) for group in groups] == [3, 3, 3]
            assert engine.counts["faults/client_process"] == 3


def test_a_stop_is_noticed_while_servers_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is put off no longer than the ranks' next exchange, and may wait again."""
    monkeypatch.setattr("zppo_mm.rollout.served.engine.EXCHANGE_SECONDS", 0.05)
    stop = threading.Event()
    with serve_vllm(TableStudent()) as server:
        server.is_open.clear()
        with engine_of(server, should_stop=stop.is_set) as engine:
            pending = engine.start(table_requests(1), SAMPLING)
            stop.set()
            with pytest.raises(StopRequested):
                pending.wait()
            stop.clear()
            server.is_open.set()
            assert [len(group) for group in pending.wait()] == [3]


def test_nothing_to_do_is_nothing_asked() -> None:
    with serve_vllm(TableStudent()) as server, engine_of(server) as engine:
        assert engine.generate([], SAMPLING) == []
    assert server.requests == []


def test_it_ends_what_it_was_given() -> None:
    class Servers:
        def __init__(self) -> None:
            self.counts: Counter[str] = Counter()
            self.is_closed = False

        def submit(self, requests: Any, policy: RetryPolicy) -> Future[Any]:
            raise NotImplementedError

        def probe(self) -> Future[Any]:
            raise NotImplementedError

        def close(self) -> None:
            self.is_closed = True

    servers, weights = Servers(), Relabelled()
    with engine_of(pool=servers, weights=weights):
        pass
    assert servers.is_closed
    assert weights.is_closed

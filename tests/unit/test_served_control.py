"""What a server is asked to load, and what it has to answer to that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.drawing_students import Asked, TableStudent
from tests.support.served_engines import SAMPLING, TABLE_MODEL, table_requests
from tests.support.vllm_server import serve_vllm
from zppo_mm.rollout.served.server_control import (
    Probe,
    PublishedAdapter,
    PublishedWeights,
    ServerControl,
    ServerFaultError,
)
from zppo_mm.rollout.served.server_process import ServerSettings
from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import ADAPTER_METHOD, METHOD
from zppo_mm.rollout.served.weight_files import WeightFile

LOAD_SECONDS = 3.0
CHECKSUMS = {"weight": "0" * 16}
WEIGHTS = PublishedWeights(
    WeightFile(1, Path("version_1"), 0, CHECKSUMS),
    "run/1",
    Probe((1, 2, 3), (3, 1), (-0.5, -1.0), frozenset(), "float32"),
)


class Loading(TableStudent):
    """Has read every file."""

    def load(self, path: Path) -> dict[str, str]:
        return dict(CHECKSUMS)


def greedy(student: TableStudent, probe: Probe) -> Probe:
    """Return the probe with the student's own continuation."""
    sampling = {"n": 1, "seed": 0, "temperature": 0.0, "max_tokens": 2, "stop_token_ids": ()}
    [(ids, logits)] = student.draw(Asked(list(probe.prompt_ids), {}, sampling))
    tops = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    return replace(probe, response_ids=tuple(ids), logprobs=tuple(map(float, tops)))


def test_adapters_are_loaded_beside_frozen_weights_and_prove_themselves() -> None:
    student = Loading()
    adapter = WeightFile(2, Path("/x/version_2/adapter.safetensors"), 0, CHECKSUMS)
    weights = replace(
        WEIGHTS, probe=greedy(student, WEIGHTS.probe), adapter=PublishedAdapter(adapter, 2.0)
    )
    with serve_vllm(student) as server:
        control = ServerControl(server.url, LOAD_SECONDS)
        control.load(weights)
        control.close()
        [probe] = server.requests
    assert probe["model"] == "policy"
    frozen = {"method": METHOD, "kwargs": {"path": "version_1", "is_frozen": True}}
    folder = {"lora_name": "policy", "lora_path": "/x/version_2", "load_inplace": True}
    compared = {"method": ADAPTER_METHOD, "kwargs": {"path": str(adapter.path), "scaling": 2.0}}
    loading = [
        each for each in server.calls if each[0] in ("/collective_rpc", "/v1/load_lora_adapter")
    ]
    assert loading == [
        ("/collective_rpc", frozen),
        ("/v1/load_lora_adapter", folder),
        ("/collective_rpc", compared),
    ]


def test_a_server_gets_room_for_the_adapters(tmp_path: Path) -> None:
    settings = ServerSettings(("vllm",), tmp_path, 100, 8, "127.0.0.1", lora_rank=12)
    words = settings.words(8001, 0)
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert "--enable-lora" in words
    assert "--enable-lora" not in replace(settings, lora_rank=0).words(8001, 0)


def test_adapters_are_asked_for_by_name() -> None:
    asked = replace(TABLE_MODEL, adapter="policy").request(table_requests(1)[0], SAMPLING, range(1))
    assert json.loads(asked.body())["model"] == "policy"
    plain = TABLE_MODEL.request(table_requests(1)[0], SAMPLING, range(1))
    assert "model" not in json.loads(plain.body())


def test_workers_that_do_not_answer_are_missed() -> None:
    """Of several data-parallel engines, the server passes on the answers of one."""
    with serve_vllm(Loading()) as server:
        server.num_workers = 2
        control = ServerControl(server.url, LOAD_SECONDS)
        with pytest.raises(ServerFaultError, match=r"got 1 answers, expected 2; start one server"):
            control.load(WEIGHTS)
        assert server.version == "loading"
        control.close()


def test_a_server_of_another_kind_or_age_is_named() -> None:
    with serve_vllm(Loading()) as server:
        server.missing = {"/pause"}
        control = ServerControl(server.url, LOAD_SECONDS)
        with pytest.raises(ServerFaultError, match=r"HTTP 404.*expected vLLM of at least 0\.32"):
            control.load(WEIGHTS)
        control.close()

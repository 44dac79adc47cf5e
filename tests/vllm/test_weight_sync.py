"""A real vLLM server gets the trained network's weights; transformers with the exported weights is
the oracle of its answers. `make test-vllm` runs this; where vLLM is not installed, it fails.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.support import network_checks
from tests.support.vllm_students import student, vllm_command
from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.served.opening import ServedStudent, open_weight_sync
from zppo_mm.rollout.served.server_control import PublishedWeights, ServerFaultError
from zppo_mm.rollout.served.weight_files import WeightFile
from zppo_mm.rollout.served.weight_sync import WeightSync
from zppo_mm.run_folder import RunFolder
from zppo_mm.weights.hf_export import export_hf_weights

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank"), pytest.mark.timeout(600)]

NUM_TOKENS = 12
PROMPT_TOKENS = 180
"""Longer than a block of the server's prefix cache."""
STUDENTS = {
    "qwen3_vl": torch.float32,
    "qwen3_vl_tied": torch.float32,
    "qwen3_5": torch.bfloat16,
}
MAX_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Of a log-prob; measured are 1e-6 in float32, and in bfloat16 up to 0.07."""


@dataclass
class Served:
    """A student, its network here and its server."""

    folder: Path
    network: VisionLanguageModel
    sync: WeightSync
    dtype: torch.dtype
    logs: Path
    version: int = 0

    @property
    def url(self) -> str:
        assert self.sync.servers is not None
        [url] = self.sync.servers.urls
        return url

    def train(self) -> None:
        """Change every weight, more than a step of training would."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                if "A_log" not in name:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.add_(noise.to(parameter.dtype))

    def push(self) -> None:
        self.version += 1
        self.sync.push(self.version)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.loads(reply.read())

    def greedy(self, ids: list[int]) -> dict[str, Any]:
        sampling = {
            "temperature": 0.0,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "logprobs": 0,
        }
        body = {"token_ids": ids, "sampling_params": sampling}
        choice: dict[str, Any] = self.post("/inference/v1/generate", body)["choices"][0]
        return choice


@pytest.fixture(scope="module", params=STUDENTS)
def served(
    request: pytest.FixtureRequest, one_rank: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    dtype = STUDENTS[request.param]
    base = tmp_path_factory.mktemp(request.param)
    folder = student(request.param, base / "student", dtype)
    name = str(dtype).removeprefix("torch.")
    network = network_checks.build(folder, ParallelConfig(), ModelConfig(params_dtype=name))
    config = RolloutConfig(
        engine="vllm",
        servers=1,
        server_command=[*vllm_command(), "--dtype", name],
        max_batch_size=16,
        max_server_restarts=1,
    )
    served_student = ServedStudent(folder, 1024, network, MegatronEngine(network, seed=0))
    sync = open_weight_sync(config, served_student, RunFolder(base / "run"))
    yield Served(folder, network, sync, dtype, base / "run" / "servers")
    sync.close()


def test_every_version_answers_as_transformers_with_its_weights(
    served: Served, tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(0, 400, PROMPT_TOKENS).tolist()
    for _ in range(3):
        served.push()
        choice = served.greedy(ids)
        expected = greedy_of_export(served, tmp_path / f"export_{served.version}", ids, choice)
        found = [each["logprob"] for each in choice["logprobs"]["content"]]
        assert max(abs(np.array(found) - expected)) <= MAX_GAP[served.dtype]
        assert choice["weight_versions"] == [
            {"version": served.sync.version_text(served.version), "start": 0, "end": NUM_TOKENS}
        ]
        served.train()
    assert served.sync.counts["failures"] == 0


def greedy_of_export(
    served: Served, export: Path, ids: list[int], choice: dict[str, Any]
) -> np.ndarray[Any, Any]:
    """Return transformers' log-probs of the server's tokens, which must be the most likely ones, or
    as likely as these up to the precision.
    """
    export_hf_weights(served.network, served.folder, export)
    oracle = transformers.AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32)
    tokens = torch.tensor([[*ids, *choice["token_ids"]]])
    with torch.no_grad():
        logits = oracle.eval()(tokens).logits[0, len(ids) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    chosen = logprobs.gather(1, tokens[0, len(ids) :, None])[:, 0]
    assert (logprobs.amax(-1) - chosen).max() <= MAX_GAP[served.dtype]
    return chosen.numpy()


def test_a_file_that_is_gone_leaves_the_server_alive(served: Served, tmp_path: Path) -> None:
    served.push()
    ids = list(range(20, 60))
    before = served.greedy(ids)
    assert served.sync.servers is not None
    [server] = served.sync.servers._servers
    missing = WeightFile(9, tmp_path / "missing.safetensors", 0, {})
    assert server._loaded is not None
    with pytest.raises(ServerFaultError, match="could not load"):
        server._control.load(PublishedWeights(missing, "x/9", server._loaded.probe))
    # It is paused until it has weights again.
    server._control.load(server._loaded)
    assert served.greedy(ids)["token_ids"] == before["token_ids"]


def test_the_log_is_in_the_run_folder(served: Served) -> None:
    assert "vLLM" in (served.logs / "server_0.log").read_text()
    assert "RANK" not in os.environ or os.environ["RANK"] == "0"

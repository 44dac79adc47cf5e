"""A real vLLM server gets the trained network's weights; transformers with the exported weights is
the oracle of its answers. `make test-vllm` runs this; where vLLM is not installed, it fails.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from tests.support import network_checks
from tests.support.running import lines, transcript
from tests.support.vllm_students import start_run, student, type_name, vllm_command
from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.config.schema import LoraConfig, ModelConfig, ParallelConfig
from zppo_mm.lora.adapters import adapters_of, add_lora
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.served.opening import ServedStudent, open_weight_sync
from zppo_mm.rollout.served.server_control import (
    ADAPTER_NAME,
    PublishedWeights,
    ServerFaultError,
)
from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import METHOD
from zppo_mm.rollout.served.weight_files import WeightFile
from zppo_mm.rollout.served.weight_sync import WeightSync
from zppo_mm.run_folder import RunFolder
from zppo_mm.weights.hf_export import export_hf_weights

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_rank"), pytest.mark.timeout(1800)]

NUM_TOKENS = 12
PROMPT_TOKENS = 180
"""Longer than a block of the server's prefix cache."""
LONG = 400
"""Tokens that a request is still about to draw when the server is paused."""
REPLY_SECONDS = 500
RUN_SECONDS = 1500
WHOLE = ("--no-enable-prefix-caching", "--no-enable-chunked-prefill")
"""On a CPU a seeded request whose prompt is prefilled in pieces ends the server, and with a prefix
cache Qwen3.5 has every longer prompt in pieces.
"""


@dataclass(frozen=True)
class Setting:
    """How a server is started.

    Attributes:
        dtype: In which it computes.
        options: Of the command.
        has_adapters: Whether adapters train, and are sent beside the frozen weights.
    """

    dtype: torch.dtype
    options: tuple[str, ...]
    has_adapters: bool = False


STUDENTS = {
    "qwen3_vl": Setting(torch.float32, ("--no-enable-chunked-prefill",), has_adapters=True),
    "qwen3_vl_tied": Setting(torch.float32, ("--tensor-parallel-size", "2")),
    "qwen3_5": Setting(torch.bfloat16, WHOLE),
}
ONE, TIED, BFLOAT16 = STUDENTS
AHEAD = ("rollout.max_staleness=1", "rollout.partial_rollouts=true")
ADAPTERS = ("rollout.send_adapters=true", "lora.rank=8", "train.lr=1e-2")
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
        """Change every weight that trains, more than a step of training would."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                if "A_log" not in name and parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.add_(noise.to(parameter.dtype))

    def push(self) -> None:
        self.version += 1
        self.sync.push(self.version)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=REPLY_SECONDS) as reply:
            return json.loads(reply.read())

    def running(self) -> bool:
        """Return whether the server works on a request."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=REPLY_SECONDS) as reply:
            rows = [row.split() for row in reply.read().decode().splitlines()]
        [number] = [row[-1] for row in rows if row[0].startswith("vllm:num_requests_running")]
        return float(number) > 0

    def greedy(self, ids: list[int], num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
        sampling = {
            "temperature": 0.0,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "logprobs": 0,
        }
        body: dict[str, Any] = {"token_ids": ids, "sampling_params": sampling}
        if adapters_of(self.network) is not None:
            body["model"] = ADAPTER_NAME
        choice: dict[str, Any] = self.post("/inference/v1/generate", body)["choices"][0]
        return choice


@pytest.fixture(scope="module", params=STUDENTS)
def served(
    request: pytest.FixtureRequest, one_rank: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    setting = STUDENTS[request.param]
    base = tmp_path_factory.mktemp(request.param)
    folder = student(request.param, base / "student", setting.dtype)
    options = ModelConfig(params_dtype=type_name(setting.dtype))
    network = network_checks.build(folder, ParallelConfig(), options)
    if setting.has_adapters:
        add_lora(network, LoraConfig(rank=8, alpha=16), seed=0)
    config = RolloutConfig(
        engine="vllm",
        send_adapters=setting.has_adapters,
        servers=1,
        server_command=vllm_command(setting.dtype, *setting.options),
        max_batch_size=16,
        max_server_restarts=1,
    )
    served_student = ServedStudent(folder, 1024, network, MegatronEngine(network, seed=0))
    sync = open_weight_sync(config, served_student, RunFolder(base / "run"))
    yield Served(folder, network, sync, setting.dtype, base / "run" / "servers")
    sync.close()


def test_every_version_answers_as_transformers_with_its_weights(
    served: Served, tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(0, 400, PROMPT_TOKENS).tolist()
    before = np.zeros(NUM_TOKENS)
    for _ in range(3):
        served.push()
        choice = served.greedy(ids)
        oracle = exported(served, tmp_path / f"export_{served.version}")
        expected = greedy_logprobs(oracle, ids, choice["token_ids"], served.dtype)
        found = [each["logprob"] for each in choice["logprobs"]["content"]]
        assert max(abs(np.array(found) - expected)) <= MAX_GAP[served.dtype]
        assert max(abs(expected - before)) > MAX_GAP[served.dtype], "training changes something"
        before = expected
        assert choice["weight_versions"] == [
            {"version": served.sync.version_text(served.version), "start": 0, "end": NUM_TOKENS}
        ]
        served.train()
    assert served.sync.counts["failures"] == 0


def exported(served: Served, folder: Path) -> torch.nn.Module:
    """Return transformers' network of the present weights."""
    export_hf_weights(served.network, served.folder, folder)
    oracle = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    network: torch.nn.Module = oracle.eval()
    return network


def greedy_logprobs(
    oracle: torch.nn.Module, ids: list[int], response: list[int], dtype: torch.dtype
) -> np.ndarray[Any, Any]:
    """Return transformers' log-probs of the server's tokens, which must be the most likely ones, or
    as likely as these up to the precision.
    """
    tokens = torch.tensor([[*ids, *response]])
    with torch.no_grad():
        logits = oracle(tokens).logits[0, len(ids) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    chosen = logprobs.gather(1, tokens[0, len(ids) :, None])[:, 0]
    assert (logprobs.amax(-1) - chosen).max() <= MAX_GAP[dtype]
    return chosen.numpy()


@pytest.mark.parametrize("served", [ONE, TIED], indirect=True)
def test_a_request_that_is_under_way_goes_on_with_the_new_weights(
    served: Served, tmp_path: Path
) -> None:
    """Everything before its next token is computed again by these."""
    served.push()
    ids = list(range(30, 60))
    before = exported(served, tmp_path / "before")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.greedy, ids, LONG)
        while not served.running() and not asked.done():
            time.sleep(0.001)
        served.post("/pause?mode=keep", {})
        served.train()
        served.push()
        choice = asked.result()
    after = exported(served, tmp_path / "after")
    first, second = choice["weight_versions"]
    versions = [served.sync.version_text(each) for each in (served.version - 1, served.version)]
    assert [first["version"], second["version"]] == versions
    end = first["end"]
    assert (first["start"], second["start"], second["end"]) == (0, end, LONG)
    drawn = choice["token_ids"]
    found = np.array([each["logprob"] for each in choice["logprobs"]["content"]])
    older = greedy_logprobs(before, ids, drawn[:end], served.dtype)
    newer = greedy_logprobs(after, [*ids, *drawn[:end]], drawn[end:], served.dtype)
    assert abs(found - [*older, *newer]).max() <= MAX_GAP[served.dtype]


def test_every_worker_has_compared_its_part(served: Served) -> None:
    """Norms, embeddings and output layers, of which each of two workers has half the rows."""
    served.push()
    assert served.sync.servers is not None
    [server] = served.sync.servers._servers
    assert server._loaded is not None
    path = server._loaded.file.path
    call = {"method": METHOD, "kwargs": {"path": str(path)}}
    results = served.post("/collective_rpc", call)["results"]
    assert len(results) == (2 if "tied" in str(served.folder) else 1)
    with safe_open(path, framework="pt") as file:
        unpacked = ("norm.weight", "embed_tokens.weight", "lm_head.weight")
        expected = sum(key.endswith(unpacked) for key in list(file.keys()))
    assert {result["num_compared"] for result in results} == {expected}


@pytest.mark.parametrize(
    ("served", "options"),
    [
        (ONE, ("modality=text", *AHEAD, *ADAPTERS)),
        (BFLOAT16, ("modality=image",)),
    ],
    indirect=["served"],
)
def test_two_steps_on_two_ranks(served: Served, options: tuple[str, ...], tmp_path: Path) -> None:
    endpoint = f"rollout.endpoints=[{served.url}]"
    process = start_run(
        tmp_path, served.folder, served.dtype, endpoint, "train.train_iters=2", *options
    )
    output, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, output[-6000:]
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    is_ahead = set(AHEAD) < set(options)
    for row in rows:
        assert row["weight_sync/bytes"] > 0
        assert row["weight_sync/failures"] == row.get("rollout/stale_groups", 0) == 0
        assert row["rollout/requests"] > 0
        for group in transcript(tmp_path / "run", row["step"]):
            is_plain = group["kind"] in ("new", "replayed")
            is_stale = is_ahead and is_plain and row["step"] > 1
            # Where a server draws the first token only after the update, it is of this step.
            allowed = {row["step"], row["step"] - is_stale}
            for rollout in group["rollouts"]:
                spans = rollout.get("versions", [[rollout["policy_version"], 1]])
                assert {version for version, _ in spans} <= allowed
    assert not is_ahead or rows[1]["rollout/staleness"] > 0


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

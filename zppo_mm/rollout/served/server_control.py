"""One vLLM server, made to load weights and to prove that it has them; by rank 0."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from zppo_mm.rollout.served.requests import NO_ROUTE
from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import ADAPTER_METHOD, METHOD
from zppo_mm.rollout.served.weight_files import WeightFile

HEALTH_SECONDS = 10.0
SHORT_SECONDS = 60.0
"""For what a server does at once."""
MAX_REPLY_BYTES = 1 << 26
MAX_SHOWN = 300
GAPS = {"float32": (2e-4, 5e-5), "float16": (0.1, 0.03), "bfloat16": (0.2, 0.05)}
"""Largest and mean difference of the log-probs of 8 greedy tokens by what is computed in. Measured
are up to 5e-6 and 9e-7 in float32, 0.07 and 0.017 in bfloat16 (docs/measurements.md); the bounds
are a few times that because deeper networks round more often, and in float32 far more because there
it costs nothing: a step of training changes more.
"""


ADAPTER_NAME = "policy"
"""Of the trained adapters at a server."""
LOADING = "loading"
"""Version of a server whose load has not ended: no request accepts what it draws."""
PROBE_PRIORITY = -1
"""Before all requests, which have 0, so that the proof does not wait for a whole queue."""


class ServerFaultError(Exception):
    """A server did not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt and its greedy continuation by the trained network.

    Attributes:
        prompt_ids: Longer than a block of a prefix cache.
        response_ids: The tokens.
        logprobs: Theirs.
        placeholders: Tokens that the trainer never takes, and a server may.
        dtype: In which the trainer computes.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    placeholders: frozenset[int]
    dtype: str

    def difference(self, tokens: list[int], logprobs: list[float], dtype: str) -> str:
        """Return in what a server's greedy continuation differs; empty if it is the same network.

        Another token is the same network's if both were about equally likely; what comes after it
        cannot be compared.

        Args:
            tokens: The server's.
            logprobs: Theirs.
            dtype: In which it computes.
        """
        coarse = GAPS["bfloat16"]
        gap, mean_gap = max(GAPS.get(self.dtype, (0.0, 0.0)), GAPS.get(dtype, coarse))
        if len(tokens) != len(self.response_ids) or len(logprobs) != len(tokens):
            return f"{len(tokens)} tokens, expected {len(self.response_ids)}"
        drawn = zip(tokens, logprobs, self.response_ids, self.logprobs, strict=True)
        for index, (token, logprob, own_token, own_logprob) in enumerate(drawn):
            if token in self.placeholders and logprob > own_logprob - gap:
                return ""
            if not abs(logprob - own_logprob) <= gap:
                return (
                    f"token {token} with log-prob {logprob:.4f} at position {index}, expected "
                    f"{own_token} with {own_logprob:.4f} or another within {gap:g}"
                )
            if token != own_token:
                return ""
        pairs = zip(logprobs, self.logprobs, strict=True)
        mean = sum(abs(logprob - own) for logprob, own in pairs) / len(logprobs)
        if mean > mean_gap:
            return f"a mean difference of log-probs of {mean:.4g}, expected at most {mean_gap:g}"
        return ""


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """Adapters that a server is to have beside frozen weights.

    Attributes:
        file: In a folder as PEFT writes it.
        scaling: Of what they add.
    """

    file: WeightFile
    scaling: float


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """What a server is to have, and how that is proven.

    Attributes:
        file: The weights; with an adapter the frozen ones.
        version: The text that a server puts beside every token.
        probe: Their network's.
        adapter: What was trained, unless the weights were.
    """

    file: WeightFile
    version: str
    probe: Probe
    adapter: PublishedAdapter | None = None


class ServerControl:
    """The routes of one server that need `VLLM_SERVER_DEV_MODE=1`.

    Args:
        url: Base URL.
        load_seconds: Most time for loading the weights, and for the proof.
        api_key: Sent as a bearer token; empty sends none.
    """

    def __init__(self, url: str, load_seconds: float, api_key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._load_seconds = load_seconds
        # Proxies of the environment are for other addresses.
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._is_paused = False
        self._client = httpx2.Client(base_url=self.url, headers=headers, trust_env=False)

    def is_healthy(self) -> bool:
        """Return whether the server answers and its engine lives."""
        try:
            return self._client.get("/health", timeout=HEALTH_SECONDS).status_code == 200
        except httpx2.HTTPError:
            return False

    def load(self, weights: PublishedWeights) -> None:
        """Have the server load weights, while its requests wait, and prove that it has them.

        Requests that it was working on go on with the new weights, and it says so in their answers.

        Raises:
            ServerFaultError: Anything went wrong. The server may have weights of both versions,
                under a name that no request accepts.
        """
        self._is_paused = True
        self._post("/pause?mode=keep&clear_cache=true")
        self._post("/update_weight_version", {"new_version": LOADING})
        is_frozen = weights.adapter is not None
        results = self._call_workers(METHOD, weights.file, {"is_frozen": is_frozen})
        if weights.adapter is not None:
            self._load_adapter(weights.adapter)
        # What was computed of a prompt or a medium with the weights before.
        done = self._post("/reset_prefix_cache?reset_running_requests=true")
        if not isinstance(done, dict) or done.get("success") is not True:
            raise ServerFaultError(f"{self.url}: the prefix cache was not reset, got {done}")
        self._post("/reset_encoder_cache")
        self._post("/update_weight_version", {"new_version": weights.version})
        self._resume(SHORT_SECONDS)
        self._prove(weights, str(results[0].get("dtype")))

    def close(self) -> None:
        """Close the connections. A server that a load has left paused goes on, if it can."""
        if self._is_paused:
            with contextlib.suppress(ServerFaultError):
                self._resume(HEALTH_SECONDS)
        self._client.close()

    def _resume(self, seconds: float) -> None:
        self._post("/resume", seconds=seconds)
        self._is_paused = False

    def _load_adapter(self, adapter: PublishedAdapter) -> None:
        """Have the server load adapters in place of those before, and every worker compare them."""
        path = adapter.file.path
        body = {"lora_name": ADAPTER_NAME, "lora_path": str(path.parent), "load_inplace": True}
        self._ask("POST", "/v1/load_lora_adapter", body, self._load_seconds, has_json=False)
        self._call_workers(ADAPTER_METHOD, adapter.file, {"scaling": adapter.scaling})

    def _call_workers(
        self, method: str, file: WeightFile, options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Call every worker about a file and compare checksums; returns their answers."""
        call = {"method": method, "kwargs": {"path": str(file.path), **options}}
        reply = self._post("/collective_rpc", call, self._load_seconds)
        results = reply.get("results") if isinstance(reply, dict) else None
        if not isinstance(results, list) or not results:
            raise ServerFaultError(f"{self.url}: no worker answered, got {str(reply)[:MAX_SHOWN]}")
        for result in results:
            if not isinstance(result, dict) or "error" in result:
                raise ServerFaultError(
                    f"{self.url}: a worker could not load {file.path}, got "
                    f"{str(result)[:MAX_SHOWN]}{_advice(result)}"
                )
            _check_sums(self.url, result.get("checksums"), file.checksums)
        self._check_number(len(results))
        return results

    def _check_number(self, num_answered: int) -> None:
        """Check that every worker of the server has answered. Of several data-parallel engines,
        vLLM passes on the answers of the first alone.
        """
        reply = self._ask("GET", "/get_world_size")
        number = reply.get("world_size") if isinstance(reply, dict) else None
        if number != num_answered:
            raise ServerFaultError(
                f"{self.url}: not every worker has proven its weights, got {num_answered} answers, "
                f"expected {number}; start one server for each data-parallel engine instead "
                "(docs/serving.md)"
            )

    def _prove(self, weights: PublishedWeights, dtype: str) -> None:
        """Compare the server's greedy continuation with the trainer's."""
        probe = weights.probe
        body: dict[str, Any] = {
            "token_ids": list(probe.prompt_ids),
            "sampling_params": {
                "n": 1,
                "temperature": 0.0,
                "max_tokens": len(probe.response_ids),
                "ignore_eos": True,
                "logprobs": 0,
                "detokenize": False,
            },
            "stream": False,
            "priority": PROBE_PRIORITY,
        }
        if weights.adapter is not None:
            body["model"] = ADAPTER_NAME
        # It may wait until one of the requests that go on has ended.
        reply = self._post("/inference/v1/generate", body, self._load_seconds)
        try:
            choice = reply["choices"][0]
            tokens = [int(token) for token in choice["token_ids"]]
            logprobs = [float(each["logprob"]) for each in choice["logprobs"]["content"]]
            versions = {span["version"] for span in choice["weight_versions"]}
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ServerFaultError(
                f"{self.url}: no greedy tokens, got {str(reply)[:MAX_SHOWN]}"
            ) from error
        if versions != {weights.version}:
            raise ServerFaultError(
                f"{self.url}: other weights, got {sorted(versions)}, expected {weights.version!r}"
            )
        difference = probe.difference(tokens, logprobs, dtype)
        if difference:
            raise ServerFaultError(
                f"{self.url}: its greedy text is not the trained network's, got {difference}"
            )

    def _post(
        self, path: str, body: Mapping[str, Any] | None = None, seconds: float = SHORT_SECONDS
    ) -> Any:
        """Post a request; returns the JSON of the reply, `None` if it has no body."""
        return self._ask("POST", path, body, seconds)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float = SHORT_SECONDS,
        has_json: bool = True,
    ) -> Any:
        try:
            with self._client.stream(method, path, json=body, timeout=seconds) as response:
                content = b"".join(_bounded(response))
        except httpx2.HTTPError as error:
            raise ServerFaultError(
                f"{self.url}{path}: no reply, got {type(error).__name__}: {error}"
            ) from error
        if response.status_code != 200:
            raise ServerFaultError(
                f"{self.url}{path}: HTTP {response.status_code}, got "
                f"{content[:MAX_SHOWN].decode(errors='replace')}"
                f"{NO_ROUTE if response.status_code == httpx2.codes.NOT_FOUND else ''}"
            )
        try:
            return json.loads(content) if content and has_json else None
        except ValueError as error:
            raise ServerFaultError(f"{self.url}{path}: no JSON, got {content[:80]!r}") from error


def _bounded(response: httpx2.Response) -> Any:
    """Yield the pieces of a reply up to a bound."""
    size = 0
    for piece in response.iter_bytes():
        size += len(piece)
        if size > MAX_REPLY_BYTES:
            raise ServerFaultError(f"{response.url}: a reply of more than {MAX_REPLY_BYTES} bytes")
        yield piece


def _advice(result: Any) -> str:
    """Return what to do about a worker's error, if it is known."""
    if "No such file" not in str(result):
        return ""
    return "; set rollout.sync_folder to a folder that the server's machine has at the same path"


def _check_sums(url: str, found: Any, expected: Mapping[str, str]) -> None:
    if found == dict(expected):
        return
    sums = found if isinstance(found, dict) else {}
    wrong = sorted(key for key in {*sums, *expected} if sums.get(key) != expected.get(key))
    raise ServerFaultError(
        f"{url}: other weights were loaded than were sent, got the checksum "
        f"{sums.get(wrong[0]) if wrong else found} for {wrong[0] if wrong else 'all'}, expected "
        f"{expected.get(wrong[0]) if wrong else len(expected)} ({len(wrong)} differ)"
    )

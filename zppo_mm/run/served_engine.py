"""From the configuration to the engine that asks vLLM servers, which the run may have started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.config.schema import RunConfig
from zppo_mm.models.decoding.cache_size import GIB
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.served.engine import ServedModel, VllmEngine, WeightSender
from zppo_mm.rollout.served.features import MediaReading
from zppo_mm.rollout.served.opening import ServedStudent, open_weight_sync
from zppo_mm.rollout.served.pool import GeneratePoolSettings, Limits
from zppo_mm.rollout.served.server_control import ADAPTER_NAME
from zppo_mm.rollout.served.weight_sync import PROBE_PROMPT_TOKENS, PROBE_TOKENS
from zppo_mm.run.shared import student_limits
from zppo_mm.run_folder import RunFolder
from zppo_mm.serving.api_key import read_key
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.serving.servers import RetryPolicy

CONNECT_SECONDS = 10.0
BACKOFF_SECONDS = 1.0
KEY_NAME = "rollout.api_key_env"


def open_served_engine(
    config: RunConfig,
    exchange: ParallelExchange,
    student: VisionLanguageModel,
    folder: Path,
    encoder: PromptEncoder,
    run_folder: RunFolder | None,
) -> VllmEngine | None:
    """Start the servers that the run is to start, and return the engine that asks all of them;
    `None` if the trained network samples. Every rank calls this.

    Args:
        config: Of the run.
        exchange: The replicas.
        student: This rank's stage of the trained network.
        folder: That the student starts from.
        encoder: Of the same model.
        run_folder: For the servers' logs; `None` is the present folder.

    Raises:
        ConfigError: On every rank, if the servers' key, command or folders cannot be used.
        ModelError: The same, if the student's folder cannot be served.
    """
    if config.rollout.engine != "vllm":
        return None
    key = read_key(config.rollout.api_key_env, KEY_NAME)
    served = ServedStudent(
        folder, sum(student_limits(config)), student, probe_engine(config, student)
    )
    logs = run_folder or RunFolder(Path())
    weights = open_weight_sync(config.rollout, served, logs, exchange.should_stop, key)
    urls = parallel.broadcast_object(weights.servers.urls if weights.servers is not None else None)
    assert urls is not None, "rank 0 has the servers"
    return vllm_engine(
        config.rollout,
        student.architecture,
        encoder,
        exchange,
        urls,
        config.seed,
        served.context,
        weights,
        weights.run,
    )


def probe_engine(config: RunConfig, student: VisionLanguageModel) -> MegatronEngine:
    """Return the engine that continues the prompt by which servers prove their weights.

    It does not look whether the run is to end: only one replica samples by it, and must come to the
    same collectives as the others.

    Raises:
        ConfigError: The decoding cache has no room for that prompt.
    """
    engine = MegatronEngine(
        student,
        config.seed,
        max_batch_size=1,
        cache_bytes=int(config.rollout.cache_memory_gib * GIB),
    )
    engine.check_longest(PROBE_PROMPT_TOKENS, PROBE_TOKENS)
    return engine


def vllm_engine(
    config: RolloutConfig,
    architecture: Architecture,
    encoder: PromptEncoder,
    exchange: ParallelExchange,
    urls: Sequence[str],
    seed: int,
    context: int,
    weights: WeightSender | None = None,
    run: str = "",
) -> VllmEngine:
    """Return the engine; every rank calls this.

    Args:
        config: Time-outs and connections.
        architecture: Of the network that the servers run.
        encoder: Of the same model.
        exchange: The replicas, which divide the connections.
        urls: Base URLs of the servers.
        seed: The run's.
        context: Tokens of the longest prompt and response that the servers have to take.
        weights: Sends weights to the servers; `None` if they keep those that they have.
        run: Names the run in the versions of the weights.

    Raises:
        ConfigError: The key's variable is not set.
    """
    adapter = ADAPTER_NAME if weights is not None and config.send_adapters else ""
    limits = Limits(
        connect_timeout_seconds=CONNECT_SECONDS,
        read_timeout_seconds=config.request_timeout_seconds,
        request_timeout_seconds=config.request_timeout_seconds,
        num_retries=0,
        backoff_seconds=BACKOFF_SECONDS,
        max_concurrency=max(1, config.max_concurrency // exchange.num_replicas),
    )
    servers = PoolProcess(
        GeneratePoolSettings(
            urls=tuple(url.rstrip("/").removesuffix("/v1") for url in urls),
            limits=limits,
            api_key=read_key(config.api_key_env, KEY_NAME),
            first=exchange.replica,
        )
    )
    return VllmEngine(
        servers,
        served_model(architecture, encoder, seed, run, context, adapter),
        exchange,
        RetryPolicy(max_seconds=config.max_wait_seconds, num_retries=None),
        weights,
        exchange.should_stop,
        num_versions=1 + config.partial_rollouts,
    )


def served_model(
    architecture: Architecture,
    encoder: PromptEncoder,
    seed: int,
    run: str,
    context: int,
    adapter: str = "",
) -> ServedModel:
    """Return what is known here of the network that servers run.

    Args:
        architecture: Of the network.
        encoder: Of the same model.
        seed: The run's.
        run: Names the run in the versions of the weights; empty if they are never sent.
        context: Tokens of the longest prompt and response that the servers have to take.
        adapter: Name of the trained adapters there; empty if they are merged, or there are none.
    """
    placeholders = (
        (architecture.image_token_id, architecture.video_token_id)
        if architecture.has_vision
        else ()
    )
    return ServedModel(
        vocabulary=architecture.vocab_size,
        reading=MediaReading(placeholders, encoder.processor, encoder.chat.video_layout),
        run=run,
        seed=seed,
        context=context,
        adapter=adapter,
    )

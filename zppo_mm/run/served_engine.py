"""From the configuration to the engine that asks vLLM servers."""

from __future__ import annotations

from collections.abc import Sequence

from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.served.engine import ServedModel, VllmEngine, WeightSender
from zppo_mm.rollout.served.features import MediaReading
from zppo_mm.rollout.served.pool import GeneratePoolSettings, Limits
from zppo_mm.serving.api_key import read_key
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.serving.servers import RetryPolicy

CONNECT_SECONDS = 10.0
BACKOFF_SECONDS = 1.0


def vllm_engine(
    config: RolloutConfig,
    architecture: Architecture,
    encoder: PromptEncoder,
    exchange: ParallelExchange,
    urls: Sequence[str],
    seed: int,
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
        weights: Sends weights to the servers; `None` if they keep those that they have.
        run: Names the run in the versions of the weights.

    Raises:
        ConfigError: The key's variable is not set.
    """
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
            api_key=read_key(config.api_key_env, "rollout.api_key_env"),
            first=exchange.replica,
        )
    )
    return VllmEngine(
        servers,
        served_model(architecture, encoder, seed, run),
        exchange,
        RetryPolicy(max_seconds=config.max_wait_seconds, num_retries=None),
        weights,
        exchange.should_stop,
    )


def served_model(
    architecture: Architecture, encoder: PromptEncoder, seed: int, run: str
) -> ServedModel:
    """Return what is known here of the network that servers run.

    Args:
        architecture: Of the network.
        encoder: Of the same model.
        seed: The run's.
        run: Names the run in the versions of the weights; empty if they are never sent.
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
    )

"""Checks of the engine that samples: its servers, and steps that overlap."""

from __future__ import annotations

from zppo_mm.config.addresses import check_addresses
from zppo_mm.config.schema import AlgorithmConfig, DistillConfig, LoraConfig, RolloutConfig
from zppo_mm.errors import ConfigError


def check_rollout(
    rollout: RolloutConfig, algorithm: AlgorithmConfig, distill: DistillConfig, lora: LoraConfig
) -> None:
    """Check what samples, and when.

    Raises:
        ConfigError: Keys that do not fit together, or that nothing would use.
    """
    _check_servers(rollout)
    _check_engine(rollout)
    _check_adapters(rollout, lora)
    _check_overlap(rollout, algorithm, distill)


def _check_servers(rollout: RolloutConfig) -> None:
    """Check the servers that the run starts."""
    if rollout.server_devices and len(rollout.server_devices) != rollout.servers:
        raise ConfigError(
            f"rollout.server_devices: one entry per server, got {len(rollout.server_devices)} for "
            f"rollout.servers={rollout.servers}, expected as many; change one of them"
        )
    if not any(rollout.server_command[:1]):
        raise ConfigError(
            f"rollout.server_command: no command, got {rollout.server_command}, expected its words "
            "one by one, such as [vllm, serve, '{model}']; correct the list"
        )


def _check_engine(rollout: RolloutConfig) -> None:
    """Check where the student samples."""
    check_addresses("rollout.endpoints", rollout.endpoints, "rollout")
    if rollout.api_key_env and not rollout.api_key_env.isidentifier():
        raise ConfigError(
            "rollout.api_key_env: not a name, expected the name of an environment variable, never "
            "the key itself; put the key there"
        )
    has_servers = bool(rollout.endpoints or rollout.servers)
    if rollout.engine == "megatron" and has_servers:
        raise ConfigError(
            "rollout.engine: servers without a use, got 'megatron' with rollout.endpoints or "
            "rollout.servers, expected 'vllm' with them; set it, or remove the servers"
        )
    if rollout.engine == "megatron":
        return
    if not has_servers:
        raise ConfigError(
            "rollout.endpoints: no servers, got none with rollout.engine='vllm', expected "
            "addresses of servers that run, or rollout.servers above 0; give one of them"
        )
    if rollout.top_p < 1 or rollout.top_k:
        raise ConfigError(
            "rollout.top_p, rollout.top_k: servers give log-probs of what these leave of a "
            f"distribution, got {rollout.top_p:g} and {rollout.top_k} with rollout.engine='vllm', "
            "expected 1 and 0; set them, or rollout.engine=megatron"
        )


def _check_adapters(rollout: RolloutConfig, lora: LoraConfig) -> None:
    """Check that there are servers for the adapters, and adapters that are all that trains."""
    if rollout.send_adapters and (rollout.engine != "vllm" or not lora.rank or lora.also_train):
        raise ConfigError(
            "rollout.send_adapters: there are no servers, or the adapters are not all that trains, "
            f"got true with rollout.engine={rollout.engine!r}, lora.rank={lora.rank} and "
            f"lora.also_train={lora.also_train}, expected vllm, a rank above 0 and []; set them, "
            "or send_adapters to false"
        )


def _check_overlap(
    rollout: RolloutConfig, algorithm: AlgorithmConfig, distill: DistillConfig
) -> None:
    """Check that rollouts by earlier weights have an engine that samples them meanwhile, and a
    correction.
    """
    if rollout.partial_rollouts and not rollout.max_staleness:
        raise ConfigError(
            "rollout.partial_rollouts: nothing is under way when the weights change, got true with "
            "rollout.max_staleness=0, expected 1 with it; set one of them"
        )
    if not rollout.max_staleness:
        return
    if rollout.engine == "megatron":
        raise ConfigError(
            "rollout.max_staleness: the network cannot sample while it trains, got "
            f"{rollout.max_staleness} with rollout.engine=megatron, expected 0; set it, or let "
            "servers sample (rollout.engine=vllm)"
        )
    if distill.source != "none":
        raise ConfigError(
            "rollout.max_staleness: distillation corrects nothing for rollouts of earlier weights, "
            f"got {rollout.max_staleness} with distill.source={distill.source!r}, expected 0; set "
            "it"
        )
    if not algorithm.largest_weight(rollout.engine):
        raise ConfigError(
            "rollout.max_staleness: rollouts of earlier weights need importance weights, got "
            f"{rollout.max_staleness} with algorithm.importance_level="
            f"{algorithm.importance_level!r}, expected another level with it; choose one, or set "
            "max_staleness to 0"
        )

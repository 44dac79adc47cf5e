"""How the student samples in training."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.config.keys import key


@dataclass(kw_only=True)
class RolloutConfig:
    """How the student samples in training."""

    num_rollouts: int = key(8, "Student rollouts per prompt (G_S).", at_least=2)
    max_response_tokens: int = key(12288, "Maximum length of a response.", at_least=1)
    temperature: float = key(
        1.0, "Sampling temperature, also used for the log-probs of the loss.", above=0
    )
    top_p: float = key(1.0, "Nucleus sampling. 1: off.", above=0, at_most=1)
    top_k: int = key(0, "Top-k sampling. 0: off.", at_least=0)
    max_batch_size: int = key(
        128,
        "Maximum number of sequences that one replica decodes at once.",
        at_least=1,
        may_change_on_resume=True,
    )
    cache_memory_gib: float = key(
        16.0,
        "Maximum memory of the decoding cache on each GPU (or of each process on CPU), in GiB. "
        "Where it is used up, sequences wait, and the youngest are computed again later "
        "(`rollout/preempted`).",
        above=0,
        may_change_on_resume=True,
    )
    engine: str = key(
        "megatron",
        "What samples: `megatron`, the training network itself, or `vllm`, vLLM servers that get "
        "the weights after every step (docs/serving.md).",
        choices=("megatron", "vllm"),
    )
    endpoints: list[str] = key(
        [],
        "Base URLs of vLLM servers that run already, for `engine: vllm`.",
        may_change_on_resume=True,
    )
    servers: int = key(
        0,
        "vLLM servers that the run starts, and starts again, on the machine of rank 0, for "
        "`engine: vllm`.",
        at_least=0,
        may_change_on_resume=True,
    )
    max_staleness: int = key(
        0,
        "Steps by which the weights that sample plain prompts may be behind those that are "
        "trained. 1: they are sampled while the step before trains. 0: on-policy.",
        at_least=0,
        at_most=1,
    )

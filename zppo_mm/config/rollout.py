"""How the student samples in training."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.config.keys import key


@dataclass(kw_only=True)
class RolloutConfig:
    """How the student samples in training."""

    num_rollouts: int = key(
        8,
        "Student rollouts per prompt (G_S).",
        at_least=2,
        also_called=("num_generations", "group_size", "n", "n_samples_per_prompt"),
    )
    max_response_tokens: int = key(
        12288,
        "Maximum length of a response.",
        at_least=1,
        also_called=("max_new_tokens", "max_completion_length", "max_response_length"),
    )
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
    server_command: list[str] = key(
        ["vllm", "serve", "{model}"],
        "Command of a server, one word per entry, with {model}, {port} and {index} for the "
        "student's folder, the port, and the number of the server from 0. The options that the "
        "run needs are appended; one that stands here is not.",
        may_change_on_resume=True,
    )
    server_devices: list[str] = key(
        [],
        "CUDA_VISIBLE_DEVICES of each server, such as ['6', '7']. Empty: that of the run.",
        may_change_on_resume=True,
    )
    server_start_seconds: float = key(
        900.0,
        "Maximum time from a server's start to its first answer.",
        above=0,
        may_change_on_resume=True,
    )
    max_server_restarts: int = key(
        5,
        "How often in a row a server may fail and be started again, or asked again if it is one of "
        "`endpoints`, before it is given up. Without servers the run stops with a checkpoint.",
        at_least=0,
        may_change_on_resume=True,
    )
    sync_folder: str = key(
        "",
        "Where the weights are written for the servers, in a folder of its own that is removed at "
        "the end. Empty: the shared memory of the machine. With servers on other machines: a "
        "folder that all of them have under the same path. There must be room for two copies.",
        may_change_on_resume=True,
    )
    send_adapters: bool = key(
        False,
        "Whether servers get the frozen weights once and the adapters of `lora` after every step, "
        "instead of merged weights, which bfloat16 rounds. vLLM must know LoRA for the model. Not "
        "with `lora.also_train`.",
    )
    sync_timeout_seconds: float = key(
        600.0,
        "Maximum time for a server to load the weights.",
        above=0,
        may_change_on_resume=True,
    )
    max_staleness: int = key(
        0,
        "Steps by which the weights that sample plain prompts may be behind those that are "
        "trained. 1: they are sampled while the step before trains. 0: on-policy.",
        at_least=0,
        at_most=1,
    )
    partial_rollouts: bool = key(
        False,
        "Whether rollouts that are under way when the servers get new weights go on with these, so "
        "that nothing waits for the longest of them (with `max_staleness: 1`).",
    )
    api_key_env: str = key(
        "",
        "Environment variable that holds the API key of the servers of `endpoints`. Empty: no key "
        "is sent.",
        may_change_on_resume=True,
    )
    max_concurrency: int = key(
        64,
        "Maximum number of prompts that one server continues at once, over all ranks, each "
        "`num_rollouts` times. Every replica has at least one.",
        at_least=1,
        may_change_on_resume=True,
    )
    request_timeout_seconds: float = key(
        1800.0,
        "Timeout for the continuations of one prompt. A server sends nothing until all of them "
        "are complete.",
        above=0,
        may_change_on_resume=True,
    )
    max_wait_seconds: float = key(
        7200.0,
        "Maximum time for the continuations of a prompt, over all attempts and with the time that "
        "it waits for others; then the run stops with a checkpoint.",
        above=0,
        may_change_on_resume=True,
    )

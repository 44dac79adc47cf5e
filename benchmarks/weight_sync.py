"""What it costs to send weights to a vLLM server, and tokens per second of both engines on a CPU.

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/weight_sync.py [--student HF_DIR] [--dtype float32]
    [--pushes 5] [--prompts 16] [--rollouts 8] [--new-tokens 64]

Without `--student` a random Llama of SmolLM2-135M's shapes is used. The engines continue the same
prompts of random tokens at temperature 1 to their full length, one after the other, each with one
thread; CPU seconds are those of the process that samples, and for vLLM of the whole server. vLLM is
that of `make vllm-env`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import torch
import transformers

from zppo_mm.config.rollout import RolloutConfig
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.experience import Prompt
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.served.opening import ServedStudent, open_weight_sync
from zppo_mm.run.shared import load_model
from zppo_mm.run_folder import RunFolder

VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "vllm"
COMMAND = (str(VLLM), "serve", "{model}", "--enforce-eager", "--skip-mm-profiling")
PROMPT_TOKENS = 64


def main() -> None:
    """Read the command line, start a server and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--dtype", default="float32")
    for name, value in (("pushes", 5), ("prompts", 16), ("rollouts", 8), ("new-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel.initialize(ParallelConfig(), seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.student or smollm2_shapes(Path(scratch) / "student", arguments.dtype)
        options = ModelConfig(student=str(folder), params_dtype=arguments.dtype)
        network = load_model(options, ParallelConfig(), folder, trainable=True)
        engine = MegatronEngine(network, seed=0)
        config = RolloutConfig(
            engine="vllm",
            servers=1,
            server_command=[*COMMAND, "--dtype", arguments.dtype, *no_tokenizer(folder)],
        )
        student = ServedStudent(folder, 1024, network, engine)
        sync = open_weight_sync(config, student, RunFolder(Path(scratch)))
        try:
            sync.push(0)
            print_pushes(sync, arguments.pushes)
            assert sync.servers is not None
            prompts = np.random.default_rng(0).integers(
                0, network.architecture.vocab_size // 2, (arguments.prompts, PROMPT_TOKENS)
            )
            sides = {
                "megatron": (lambda: sample_here(engine, prompts, arguments), [psutil.Process()]),
                "vllm": (
                    lambda: sample_there(sync.servers.urls[0], prompts, arguments),
                    psutil.Process(sync.servers.pids[0]).children(recursive=True),
                ),
            }
            for name, (sample, processes) in sides.items():
                print_speed(name, sample, processes, arguments)
        finally:
            sync.close()


def no_tokenizer(folder: Path) -> list[str]:
    """Return the option for a folder of weights alone."""
    return [] if (folder / "tokenizer.json").is_file() else ["--skip-tokenizer-init"]


def smollm2_shapes(folder: Path, dtype: str) -> Path:
    """Write a random network of SmolLM2-135M's shapes."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def print_pushes(sync: Any, number: int) -> None:
    """Send the weights several times and print the medians."""
    seconds, cpu_seconds = [], []
    before = sync.counts
    for version in range(1, number + 1):
        started, used = sync.counts["seconds"], time.process_time()
        sync.push(version)
        seconds.append(sync.counts["seconds"] - started)
        cpu_seconds.append(time.process_time() - used)
    num_bytes = (sync.counts["bytes"] - before["bytes"]) / number
    print(
        f"a push: {num_bytes / 1e6:.1f} MB, {statistics.median(seconds):.2f} s, of which this "
        f"process used {statistics.median(cpu_seconds):.2f} CPU seconds"
    )


def sample_here(engine: MegatronEngine, prompts: Any, arguments: argparse.Namespace) -> None:
    """Continue all prompts with the training network."""
    requests = [
        GenerationRequest(
            Prompt("", ids, np.tile(np.arange(len(ids)), (3, 1)), len(ids)),
            (),
            arguments.rollouts,
            ("benchmark", index),
        )
        for index, ids in enumerate(prompts)
    ]
    engine.generate(
        requests,
        SamplingParams(temperature=1.0, max_new_tokens=arguments.new_tokens, stop_token_ids=()),
    )


def sample_there(url: str, prompts: Any, arguments: argparse.Namespace) -> None:
    """Continue all prompts with the server, all at once."""

    def ask(ids: Any) -> None:
        sampling = {
            "n": arguments.rollouts,
            "temperature": 1.0,
            "max_tokens": arguments.new_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        }
        body = {"token_ids": ids.tolist(), "sampling_params": sampling}
        httpx2.post(f"{url}/inference/v1/generate", json=body, timeout=600).raise_for_status()

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(ask, prompts))


def print_speed(
    name: str,
    sample: Callable[[], None],
    processes: list[psutil.Process],
    arguments: argparse.Namespace,
) -> None:
    """Sample twice and print the second time."""
    sample()
    used, started = cpu_seconds_of(processes), time.monotonic()
    sample()
    seconds = time.monotonic() - started
    used = cpu_seconds_of(processes) - used
    tokens = arguments.prompts * arguments.rollouts * arguments.new_tokens
    print(f"{name}: {tokens / seconds:.0f} tokens/s, {tokens / used:.0f} per CPU second")


def cpu_seconds_of(processes: list[psutil.Process]) -> float:
    """Return the CPU seconds of processes so far."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


if __name__ == "__main__":
    main()

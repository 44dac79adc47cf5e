"""Sampling and updates of a random network of a published shape: tokens per second and MFU.

    python benchmarks/gpu_network.py sample|update|fp8 [--size Qwen3.5-0.8B]
        [--impl transformer_engine] [--fp8 hybrid] [--recipe tensorwise] [--share never]

One JSON line per measurement. `fp8` is benchmarks/fp8.py with weights drawn on the GPU, since half
a billion numbers take longer to draw on the CPU than to measure. `--size tiny` runs on a CPU too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import fp8 as fp8_table
from data.question import Question
from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from zppo_mm.experience import Prompt, TrainingSample
from zppo_mm.models.families.architecture import parse_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.planning.memory import estimate_memory
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.training.batching import build_batches, plan_batches
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights.mapping import parameter_mappings

PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 or H200, by the datasheet
TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
KERNELS_SHOWN = 40
RESERVED_IDS = 100  # the last ids of the vocabulary, special tokens among them, are not drawn


@torch.no_grad()
def draw_weights(network: VisionLanguageModel, seed: int = 0) -> None:
    """Set the weights at random on the device, the same for every implementation."""
    for mapping in parameter_mappings(network):
        key, parameter = mapping.keys[0], mapping.parameter
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=6).digest()
        stream = torch.Generator(device=parameter.device)
        stream.manual_seed(int.from_bytes(digest, "little"))
        if key.endswith("A_log"):
            parameter.uniform_(1.0, 16.0, generator=stream).log_()
        elif key.endswith(("dt_bias", "linear_attn.norm.weight")):
            parameter.fill_(1)
        elif parameter.dim() == 1:
            zero = network.architecture.zero_centered_norm or key.endswith("bias")
            parameter.fill_(0 if zero else 1)
        else:
            parameter.normal_(0, 0.02, generator=stream)


def text_config(size: str) -> dict[str, Any]:
    """Return the config.json of a published language model, or of a tiny one of its kind."""
    published = PUBLISHED["Qwen3.5-0.8B" if size == "tiny" else size][0]
    raw = dict(published.get("text_config", published))
    if size == "tiny":
        rope = {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
        raw |= {**TINY, "rope_parameters": {**raw["rope_parameters"], **rope}}
    return raw


def build(arguments: argparse.Namespace, trainable: bool) -> VisionLanguageModel:
    """Build the network on this device."""
    model = ModelConfig(
        transformer_impl=arguments.impl,
        params_dtype=arguments.dtype,
        fp8=arguments.fp8,
        fp8_recipe=arguments.recipe,
    )
    architecture = parse_architecture(text_config(arguments.size))
    network = build_model(architecture, model, ParallelConfig(), trainable=trainable)
    draw_weights(network)
    return network


def matrix_parameters(network: VisionLanguageModel) -> tuple[int, int]:
    """Return the number of weights that every token is multiplied with, and the output layer's."""
    inner = sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if parameter.dim() == 2 and "embedding" not in name and "output_layer" not in name
    )
    return inner, network.architecture.vocab_size * network.architecture.hidden_size


def report(**values: object) -> None:
    """Print one measurement."""
    if torch.cuda.is_available():
        values["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        values["device"] = torch.cuda.get_device_name()
    print(json.dumps(values), flush=True)


def clock() -> float:
    """Return the time after all work that was given to the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def profiled(arguments: argparse.Namespace, work: Callable[[], object]) -> None:
    """Print the kernels that a piece of work spends most time in, and how long the GPU is busy."""
    if not arguments.profile or not torch.cuda.is_available():
        return
    started = clock()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        seconds = clock() - started
    # Their own sum: the profiler's tables take minutes at some hundred thousand launches.
    kernels: dict[str, list[float]] = {}
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name(), []).append(event.duration_ns() / 1e6)
    busy = sum(map(sum, kernels.values()))
    print(f"profiled: {seconds * 1e3:.0f} ms, of which the GPU was busy {busy:.0f} ms")
    for name, times in sorted(kernels.items(), key=lambda each: -sum(each[1]))[:KERNELS_SHOWN]:
        print(f"{sum(times):9.1f} ms {len(times):7} x {name[:150]}")


def sample(arguments: argparse.Namespace) -> None:
    """Measure sampling, first of two tokens per rollout as a warm-up."""
    network = build(arguments, trainable=False)
    inner, output = matrix_parameters(network)
    num_sequences = arguments.prompts * arguments.rollouts
    engine = MegatronEngine(network, 0, max_batch_size=num_sequences)
    random = np.random.default_rng(0)
    vocabulary = network.architecture.vocab_size - RESERVED_IDS
    requests = []
    for index in range(arguments.prompts):
        ids = random.integers(0, vocabulary, arguments.prompt_tokens)
        prompt = Prompt("", ids, np.tile(np.arange(len(ids)), (3, 1)), len(ids))
        requests.append(GenerationRequest(prompt, (), arguments.rollouts, ("bench", index)))
    for num_tokens in (2, arguments.new_tokens, arguments.new_tokens):
        params = SamplingParams(temperature=1.0, max_new_tokens=num_tokens, stop_token_ids=())
        started = clock()
        groups = engine.generate(requests, params)
        seconds = clock() - started
        made = sum(len(item.response_ids) for group in groups for item in group)
        prompt_flops = 2 * inner * arguments.prompts * arguments.prompt_tokens
        flops = 2 * (inner + output) * made + prompt_flops
        report(
            what="sample",
            size=arguments.size,
            impl=arguments.impl,
            fp8=arguments.fp8,
            batch=num_sequences,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=num_tokens,
            seconds=round(seconds, 3),
            tokens_per_second=round(made / seconds),
            ms_per_step=round(seconds / num_tokens * 1e3, 2),
            mfu=round(flops / seconds / PEAK_FLOPS, 4),
        )
    profiled(arguments, lambda: engine.generate(requests, replace(params, max_new_tokens=32)))


def training_samples(arguments: argparse.Namespace, vocabulary: int) -> list[TrainingSample]:
    """Return groups of random responses to random prompts, half of them with advantage -1."""
    random = np.random.default_rng(0)
    prompt, response = arguments.prompt_tokens, arguments.new_tokens
    mask = np.repeat(np.array([0, 1], np.float32), [prompt, response])
    samples = []
    for group in range(arguments.prompts):
        start = random.integers(0, vocabulary, prompt)
        for rollout in range(arguments.rollouts):
            samples.append(
                TrainingSample(
                    uid=f"group-{group}",
                    question=Question(f"group-{group}", "", (), "", "math"),
                    token_ids=np.concatenate([start, random.integers(0, vocabulary, response)]),
                    positions=np.tile(np.arange(prompt + response), (3, 1)),
                    loss_mask=mask,
                    old_logprobs=-mask * np.float32(np.log(vocabulary)),
                    advantages=mask * np.float32(1 - 2 * (rollout % 2)),
                )
            )
    return samples


def planned_bytes(network: VisionLanguageModel, arguments: argparse.Namespace, longest: int) -> int:
    """Return what the planner expects an update of the network in plain torch to take, with packs
    of at most `longest` tokens.
    """
    config = load_config(None)
    config.train.micro_batch_tokens = longest
    config.data.max_prompt_tokens = arguments.prompt_tokens
    config.rollout.max_response_tokens = arguments.new_tokens
    config.model.recompute = "none"
    estimate = estimate_memory(network.architecture, config, 1)
    state = estimate.weights + estimate.gradients + estimate.optimizer
    return state + estimate.activations + estimate.output


def update(arguments: argparse.Namespace) -> None:
    """Measure gradient updates; the first is a warm-up."""
    network = build(arguments, trainable=True)
    inner, output = matrix_parameters(network)
    budget = arguments.micro_batch_tokens
    train = TrainConfig(share_prompts=arguments.share, micro_batch_tokens=budget)
    policy = Policy(network, train, ParallelConfig(), PolicyObjective(AlgorithmConfig(), 1.0))
    samples = training_samples(arguments, network.architecture.vocab_size - RESERVED_IDS)
    plan = plan_batches(
        samples,
        num_minibatches=1,
        num_replicas=1,
        micro_batch_tokens=budget,
        random=np.random.default_rng(0),
        skip_zero_advantage=False,
        share_prompts=policy.shares_prompts,
    )
    # In memory, so that building micro-batches is not part of what is measured.
    batches = [
        replace(batch, microbatches=list(batch.microbatches))
        for batch in build_batches(plan, samples, replica=0, media=None, device=parallel.device())
    ]
    lengths = [len(each.token_ids) for batch in batches for each in batch.microbatches]
    num_forward = sum(lengths)
    rows = len(samples) * arguments.new_tokens
    times = []
    for _ in range(arguments.repeats + 1):
        started = clock()
        (made,) = policy.train_step(batches).updates
        times.append(clock() - started)
    seconds = statistics.median(times[1:])
    report(
        what="update",
        size=arguments.size,
        impl=arguments.impl,
        fp8=arguments.fp8,
        recipe=arguments.recipe if arguments.fp8 else "",
        share=policy.shares_prompts,
        samples=len(samples),
        forward_tokens=num_forward,
        microbatches=len(lengths),
        first_seconds=round(times[0], 3),
        seconds=round(seconds, 3),
        tokens_per_second=round(num_forward / seconds),
        mfu=round(6 * (inner * num_forward + output * rows) / seconds / PEAK_FLOPS, 4),
        loss=made.loss,
        grad_norm=made.grad_norm,
        planned_GiB=round(planned_bytes(network, arguments, max(lengths)) / 2**30, 2),
    )
    profiled(arguments, lambda: policy.train_step(batches))


def fp8(arguments: argparse.Namespace) -> None:
    """Print one recipe's row of the table of benchmarks/fp8.py."""
    vars(fp8_table)["initialize_weights"] = draw_weights
    sizes = ["--layers", str(arguments.layers), "--tokens", str(arguments.tokens)]
    sys.argv = ["fp8.py", "--recipes", arguments.recipe, *sizes]
    fp8_table.main()


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sample", "update", "fp8"])
    parser.add_argument("--size", default="Qwen3.5-0.8B")
    parser.add_argument("--impl", default="local")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--fp8", default="")
    parser.add_argument("--recipe", default="tensorwise")
    parser.add_argument("--share", default="auto")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes")
    arguments = parser.parse_args()
    if arguments.what == "fp8":
        fp8(arguments)
        return
    parallel.initialize(ParallelConfig(), seed=0)
    (sample if arguments.what == "sample" else update)(arguments)
    parallel.shutdown()


if __name__ == "__main__":
    main()

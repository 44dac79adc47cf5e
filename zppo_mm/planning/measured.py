"""Passes of small random networks, timed: what calibration fits the rates of passes to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen3_5TextConfig

from data.question import Question
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from zppo_mm.experience import Prompt, TrainingSample
from zppo_mm.models.families.architecture import Architecture, parse_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.planning.operations import (
    Work,
    decode_work,
    forward_work,
    output_flops,
    train_passes,
)
from zppo_mm.planning.update_time import GRADIENT_BYTES, UPDATE_TRAFFIC
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.training.batching import build_batches, plan_batches
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights.initial_weights import initialize_weights

HEAD_DIM = 64
VOCABULARY = 4096
NUM_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Timed:
    """Work, and the seconds that it took."""

    work: Work
    seconds: float


def reference_architecture(width: int, num_layers: int) -> Architecture:
    """Return a text network with DeltaNet and attention layers in the family's proportions."""
    heads = width // HEAD_DIM
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=HEAD_DIM,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
        tie_word_embeddings=True,
    )
    return parse_architecture(config.to_dict())


def clock() -> float:
    """Return a time in seconds: of this process alone where one thread does all the work, so that
    other processes do not matter.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def fastest(
    work: Callable[[], object],
    num_rounds: int = NUM_ROUNDS,
    now: Callable[[], float] = clock,
) -> float:
    """Return the fewest seconds of several rounds after one to warm up."""
    work()
    seconds = []
    for _ in range(num_rounds):
        started = now()
        work()
        seconds.append(now() - started)
    return min(seconds)


def network(architecture: Architecture, dtype: str, trainable: bool) -> VisionLanguageModel:
    """Return a random network."""
    model = build_model(
        architecture, ModelConfig(params_dtype=dtype), ParallelConfig(), trainable=trainable
    )
    initialize_weights(model, 0)
    return model


def timed_decoding(
    architecture: Architecture, dtype: str, batch: int, prompt_tokens: int, num_tokens: int
) -> Timed:
    """Sample from prompts of one length, two rollouts of each, and leave out the prefill."""
    engine = MegatronEngine(network(architecture, dtype, trainable=False), 0, batch)
    random = np.random.default_rng(0)
    requests = [
        GenerationRequest(
            Prompt("", ids, np.tile(np.arange(len(ids)), (3, 1)), len(ids)), (), 2, ("calibrate", n)
        )
        for n, ids in enumerate(random.integers(0, VOCABULARY, (batch // 2, prompt_tokens)))
    ]

    def generate(count: int) -> float:
        sampling = SamplingParams(temperature=1.0, max_new_tokens=count, stop_token_ids=())
        return fastest(lambda: engine.generate(requests, sampling))

    flops, traffic, cached = decode_work(architecture)
    mean_context = prompt_tokens + num_tokens / 2
    element = torch.finfo(getattr(torch, dtype)).bits // 8
    work = Work(flops, traffic + cached * element * mean_context) * batch + Work(
        layers=architecture.num_layers + 1
    )
    return Timed(work * num_tokens, generate(num_tokens + 1) - generate(1))


def timed_update(
    architecture: Architecture, dtype: str, num_samples: int, tokens: int, pack: int
) -> Timed:
    """Make an update over samples of one length without common prompts."""
    model, layout = network(architecture, dtype, trainable=True), ParallelConfig()
    train = TrainConfig(updates_per_step=1, lr=1e-6, micro_batch_tokens=pack)
    policy = Policy(
        model, train, layout, PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
    )
    random, half = np.random.default_rng(0), tokens // 2
    mask = np.repeat(np.array([0, 1], dtype=np.float32), [tokens - half, half])
    samples = [
        TrainingSample(
            uid=str(number),
            question=Question(str(number), "", (), "", "math"),
            token_ids=random.integers(0, VOCABULARY, tokens),
            positions=np.tile(np.arange(tokens), (3, 1)),
            loss_mask=mask,
            old_logprobs=-mask * np.float32(np.log(VOCABULARY)),
            advantages=mask * np.float32(1 - 2 * (number % 2)),
        )
        for number in range(num_samples)
    ]
    plan = plan_batches(
        samples,
        num_minibatches=1,
        num_replicas=1,
        micro_batch_tokens=pack,
        random=np.random.default_rng(0),
        skip_zero_advantage=True,
        share_prompts=False,
    )
    batches = build_batches(plan, samples, replica=0, media=None, device=parallel.device())
    packs = len(batches[0].microbatches)
    work = forward_work(architecture, layout, num_samples * tokens, tokens / 2)
    work *= train_passes("none")
    work += Work(3 * output_flops(architecture, num_samples * half))
    work += Work(layers=3 * packs * architecture.num_layers)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work += Work(traffic=parameters * (UPDATE_TRAFFIC + 2 * GRADIENT_BYTES))
    return Timed(work, fastest(lambda: policy.train_step(batches)))

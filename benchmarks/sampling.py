"""Tokens per second of the Megatron engine beside transformers' generate, on the same weights, in
one process.

    python benchmarks/sampling.py [--model HF_DIR] [--prompts 16] [--rollouts 8] [--new-tokens 128]
    [--threads 1] [--rounds 3]

Without `--model` a random Qwen3.5 of about ten million parameters is used. Both sides continue the
same prompts of random tokens at temperature 1, without stop tokens, so that every response has the
same length; both hold all rollouts in one batch. The sides run in turns after a warm-up, so that a
busy machine slows both alike. Wall-clock tokens per second are medians over the rounds; the ratio
of CPU seconds does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.experience import Prompt
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.run.shared import load_model

SEED = 0
SHORTEST_PROMPT, LONGEST_PROMPT = 64, 128


@dataclass
class Side:
    """One way to sample, and what was measured."""

    name: str
    run: Callable[[], int]
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def measure(self) -> None:
        """Run once and keep the times."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.num_tokens = self.run()
        self.wall_seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)

    @property
    def tokens_per_second(self) -> float:
        """Median over the rounds."""
        return self.num_tokens / statistics.median(self.wall_seconds)


def random_model() -> Qwen3_5ForConditionalGeneration:
    """Return a network of about ten million parameters with the proportions of the smallest of the
    family.
    """
    text: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "max_position_embeddings": 8192,
        "full_attention_interval": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 256,
    }
    ids = {
        "image_token_id": 4090,
        "video_token_id": 4091,
        "vision_start_token_id": 4092,
        "vision_end_token_id": 4093,
    }
    torch.manual_seed(SEED)
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )


def make_prompts(count: int, vocab_size: int) -> list[np.ndarray]:
    """Return prompts of random tokens below every special one, of different lengths."""
    rng = np.random.default_rng(SEED)
    return [
        rng.integers(0, vocab_size - 1000, rng.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1))
        for _ in range(count)
    ]


def engine_side(folder: Path, prompts: list[np.ndarray], arguments: argparse.Namespace) -> Side:
    """Return the Megatron engine on one process."""
    layout = ParallelConfig()
    parallel.initialize(layout, SEED)
    options = ModelConfig(params_dtype="float32", transformer_impl="local")
    network = load_model(options, layout, folder, trainable=False)
    engine = MegatronEngine(network, SEED, max_batch_size=arguments.prompts * arguments.rollouts)
    requests = [
        GenerationRequest(
            Prompt("", ids, np.tile(np.arange(len(ids)), (3, 1)), len(ids)),
            (),
            arguments.rollouts,
            ("benchmark", index),
        )
        for index, ids in enumerate(prompts)
    ]
    sampling = SamplingParams(
        temperature=1.0, max_new_tokens=arguments.new_tokens, stop_token_ids=()
    )

    def run() -> int:
        return sum(
            len(item.response_ids)
            for group in engine.generate(requests, sampling)
            for item in group
        )

    return Side("zppo_mm", run)


def transformers_side(
    folder: Path, prompts: list[np.ndarray], arguments: argparse.Namespace
) -> Side:
    """Return transformers' generate on left-padded prompts, each repeated once per rollout."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    # No stop token: every response has full length on both sides.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = (tensor.repeat_interleave(arguments.rollouts, 0) for tensor in (ids, mask))
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": arguments.new_tokens,
    }

    def run() -> int:
        output = model.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=torch.zeros_like(ids), **settings
        )
        return int(output[:, longest:].numel())

    return Side("transformers", run)


def main() -> None:
    """Measure both sides in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder; a random network if not given"
    )
    for name, default, meaning in (
        ("--prompts", 16, "different prompts"),
        ("--rollouts", 8, "responses per prompt"),
        ("--new-tokens", 128, "tokens per response"),
        ("--threads", 1, "threads of the process"),
        ("--rounds", 3, "measured runs per side"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default {default})")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or Path(temporary)
        if arguments.model is None:
            random_model().save_pretrained(folder)
        prompts = make_prompts(arguments.prompts, load_architecture(folder).vocab_size)
        # transformers first: once the CPU patches are in place, its loading leaves rotary
        # frequencies uninitialised.
        theirs = transformers_side(folder, prompts, arguments)
        ours = engine_side(folder, prompts, arguments)
        sides = [ours, theirs]
        for _ in range(arguments.rounds + 1):
            for side in sides:
                side.measure()
    for side in sides:
        del side.wall_seconds[0], side.cpu_seconds[0]
    assert ours.num_tokens == theirs.num_tokens, "both sides must make the same number of tokens"
    print(
        f"{arguments.prompts} prompts x {arguments.rollouts} rollouts x {arguments.new_tokens} "
        f"tokens, {arguments.threads} thread(s)"
    )
    for side in sides:
        print(
            f"{side.name:14}{side.tokens_per_second:10.0f} "
            f"tokens/s{statistics.median(side.cpu_seconds):10.2f} CPU seconds"
        )
    cpu_ratio = statistics.median(theirs.cpu_seconds) / statistics.median(ours.cpu_seconds)
    print(
        f"ratio {ours.tokens_per_second / theirs.tokens_per_second:.2f} by the clock, "
        f"{cpu_ratio:.2f} by CPU time"
    )
    parallel.shutdown()


if __name__ == "__main__":
    main()

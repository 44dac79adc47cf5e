"""Tokens per second of the Megatron engine beside transformers' generate, or beside the engine of
another checkout of this repository, on the same weights.

    python benchmarks/sampling.py [--model HF_DIR] [--prompts 16] [--rollouts 8] [--new-tokens 128]
    [--mean-tokens 0] [--batch 128] [--dtype float32] [--threads 1] [--rounds 3] [--other PATH]

Without `--model` a random Qwen3.5 of about ten million parameters is used. All sides continue the
same prompts of random tokens at temperature 1. `--mean-tokens` makes so many tokens stop tokens
that responses of a random network end after so many on average, at any length; 0 has no stop
tokens, and every response has full length. The sides run in turns after a warm-up, so that a busy
machine slows all alike. Wall-clock tokens per second are medians over the rounds; the ratio of CPU
seconds does not depend on what else the machine does. Each engine runs in a process of its own; in
float32 the engines of two checkouts have to sample the same tokens. transformers takes part only
without `--other` and with equal lengths, all rollouts in one batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


@dataclass(frozen=True)
class Result:
    """What one run gave: tokens, their hash (empty if nobody compares it), and times."""

    num_tokens: int
    digest: str
    wall_seconds: float
    cpu_seconds: float


@dataclass
class Side:
    """One way to sample, and what was measured."""

    name: str
    run: Callable[[], Result]
    results: list[Result] = field(default_factory=list)

    def measure(self) -> None:
        """Run once and keep the result."""
        self.results.append(self.run())

    def median(self, name: str) -> float:
        """Return the median of a time over the rounds, without the warm-up."""
        return statistics.median(getattr(result, name) for result in self.results[1:])

    @property
    def tokens_per_second(self) -> float:
        """Median over the rounds."""
        return self.results[-1].num_tokens / self.median("wall_seconds")


def timed(sample: Callable[[], tuple[int, str]]) -> Result:
    """Sample, and return what came of it with the times."""
    wall, cpu = time.perf_counter(), time.process_time()
    num_tokens, digest = sample()
    return Result(num_tokens, digest, time.perf_counter() - wall, time.process_time() - cpu)


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


def serve_engine(folder: Path, arguments: argparse.Namespace) -> None:
    """Sample once per line of the standard input; answers a line of JSON each time."""
    layout = ParallelConfig()
    parallel.initialize(layout, SEED)
    options = ModelConfig(params_dtype=arguments.dtype, transformer_impl="local")
    network = load_model(options, layout, folder, trainable=False)
    engine = MegatronEngine(network, SEED, max_batch_size=arguments.batch)
    vocab_size = load_architecture(folder).vocab_size
    requests = [
        GenerationRequest(
            Prompt("", ids, np.tile(np.arange(len(ids)), (3, 1)), len(ids)),
            (),
            arguments.rollouts,
            ("benchmark", index),
        )
        for index, ids in enumerate(make_prompts(arguments.prompts, vocab_size))
    ]
    num_stops = vocab_size // arguments.mean_tokens if arguments.mean_tokens else 0
    sampling = SamplingParams(
        temperature=1.0,
        max_new_tokens=arguments.new_tokens,
        stop_token_ids=tuple(range(num_stops)),
    )

    def sample() -> tuple[int, str]:
        groups = engine.generate(requests, sampling)
        lengths = [len(item.response_ids) for group in groups for item in group]
        whole = np.concatenate([item.response_ids for group in groups for item in group])
        return sum(lengths), hashlib.sha256(whole.tobytes()).hexdigest()

    for _ in sys.stdin:
        print(json.dumps(vars(timed(sample))), flush=True)
    parallel.shutdown()


@contextmanager
def engine_side(
    name: str, checkout: Path, folder: Path, arguments: argparse.Namespace
) -> Iterator[Side]:
    """Start an engine of a checkout in a process of its own."""
    names = ("prompts", "rollouts", "new_tokens", "mean_tokens", "batch", "dtype", "threads")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", f"--model={folder}", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def run() -> Result:
        asked.write("\n")
        asked.flush()
        return Result(**json.loads(answers.readline()))

    yield Side(name, run)
    asked.close()
    process.wait()


def transformers_side(
    folder: Path, prompts: list[np.ndarray], arguments: argparse.Namespace
) -> Side:
    """Return transformers' generate on left-padded prompts, each repeated once per rollout."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, arguments.dtype)
    ).eval()
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

    def sample() -> tuple[int, str]:
        output = model.generate(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=torch.zeros_like(ids), **settings
        )
        return int(output[:, longest:].numel()), ""

    return Side("transformers", lambda: timed(sample))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder; a random network if not given"
    )
    for name, default, meaning in (
        ("--prompts", 16, "different prompts"),
        ("--rollouts", 8, "responses per prompt"),
        ("--new-tokens", 128, "most tokens of a response"),
        ("--mean-tokens", 0, "tokens after which a response ends on average; 0: all full"),
        ("--batch", 128, "most sequences that an engine decodes at once"),
        ("--threads", 1, "threads of a process"),
        ("--rounds", 3, "measured runs per side"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--other", type=Path, help="another checkout, measured instead of transformers"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(folder: Path, arguments: argparse.Namespace) -> list[Side]:
    """Measure all sides in turns; ours first."""
    here = Path(__file__).parents[1]
    with ExitStack() as processes:
        sides = [processes.enter_context(engine_side("zppo_mm", here, folder, arguments))]
        if arguments.other:
            other = engine_side("other", arguments.other, folder, arguments)
            sides.append(processes.enter_context(other))
        elif not arguments.mean_tokens:
            prompts = make_prompts(arguments.prompts, load_architecture(folder).vocab_size)
            sides.append(transformers_side(folder, prompts, arguments))
        for _ in range(arguments.rounds + 1):
            for side in sides:
                side.measure()
    return sides


def main() -> None:
    """Measure the sides and print the table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        serve_engine(arguments.model, arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or Path(temporary)
        if arguments.model is None:
            random_model().save_pretrained(folder)
        ours, *others = sides = measure(folder, arguments)
    print(
        f"{arguments.prompts} prompts x {arguments.rollouts} rollouts, "
        f"{ours.results[-1].num_tokens / arguments.prompts / arguments.rollouts:.0f} tokens on "
        f"average and {arguments.new_tokens} at most, {arguments.batch} at once, "
        f"{arguments.dtype}, {arguments.threads} thread(s)"
    )
    for side in sides:
        print(
            f"{side.name:14}{side.tokens_per_second:10.0f} "
            f"tokens/s{side.median('cpu_seconds'):10.2f} CPU seconds"
        )
    for other in others:
        print(
            f"ratio to {other.name}: {ours.tokens_per_second / other.tokens_per_second:.2f} by the "
            f"clock, {other.median('cpu_seconds') / ours.median('cpu_seconds'):.2f} by CPU time"
        )
        if arguments.dtype == "float32":
            ours_last, theirs = ours.results[-1], other.results[-1]
            assert ours_last.num_tokens == theirs.num_tokens, "all sides make as many tokens"
            assert theirs.digest in ("", ours_last.digest), "engines sample the same tokens"


if __name__ == "__main__":
    main()

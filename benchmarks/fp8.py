"""FP8 on and off on a GPU: step time, peak memory and divergence of a network of real shape with
random weights.

    python benchmarks/fp8.py [--recipes tensorwise delayed blockwise mxfp8] [--layers 8] [--tokens
    8192]

The shape is Qwen3.5-2B's language model with fewer layers. Weights are random: time and memory are
those of a trained network of this shape, the divergence is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.families.architecture import parse_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.optimizer import wrap_model
from zppo_mm.weights.initial_weights import initialize_weights

WARM_UP, REPEATS = 3, 10
SEQUENCES = 8


def measure(raw: dict, model: ModelConfig, tokens: int) -> tuple[float, float, torch.Tensor]:
    """Return median seconds of a forward and backward pass, peak GiB, and float32 log-probs `[rows,
    vocabulary]` of some rows.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    network = build_model(parse_architecture(raw), model, ParallelConfig())
    initialize_weights(network, seed=0)
    # Weight gradients go into buffers, as in training.
    wrapped = wrap_model(network, ParallelConfig())
    ids = torch.randint(
        0, raw["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(0)
    ).cuda()
    length = tokens // SEQUENCES
    positions = torch.arange(length).repeat(SEQUENCES).expand(3, -1).cuda()
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32).cuda()
    rows = torch.arange(0, tokens, 16).cuda()
    times = []
    for _ in range(WARM_UP + REPEATS):
        wrapped.zero_grad_buffer()
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = wrapped(ids, positions, bounds, rows=rows)
        logits.log_softmax(-1)[:, 0].mean().backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return statistics.median(times[WARM_UP:]), peak, logits.detach().float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["tensorwise", "delayed", "blockwise"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("FP8 runs on a GPU, got none, expected CUDA; run this where a GPU is")
    published = PUBLISHED["Qwen3.5-2B"][0]
    raw = {**published["text_config"], "num_hidden_layers": arguments.layers}
    parallel.initialize(ParallelConfig(), seed=0)
    half = {"transformer_impl": "transformer_engine", "params_dtype": "bfloat16"}
    seconds, peak, exact = measure(raw, ModelConfig(**half), arguments.tokens)
    print(
        "| recipe | step time | against bf16 | peak GiB | KL to bf16, nats per token "
        "|\n|---|---|---|---|---|"
    )
    print(f"| bf16 | {seconds * 1e3:.1f} ms | 1 | {peak:.2f} | 0 |")
    for recipe in arguments.recipes:
        ours, memory, found = measure(
            raw, ModelConfig(**half, fp8="hybrid", fp8_recipe=recipe), arguments.tokens
        )
        divergence = (exact.exp() * (exact - found)).sum(-1).mean().item()
        print(
            f"| {recipe} | {ours * 1e3:.1f} ms | {seconds / ours:.2f} x | {memory:.2f} | "
            f"{divergence:.4f} |"
        )
    parallel.shutdown()


if __name__ == "__main__":
    main()

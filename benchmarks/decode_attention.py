"""One decoding step's attention to prompts that rollouts share, beside attention to a copy of the
prompt per rollout.

    python benchmarks/decode_attention.py [--dtype float32] [--prompts 8] [--rollouts 8] [--head-dim
    64] [--rounds 200]

Two KV heads of four query heads each; one layer. Copies are read by
`scaled_dot_product_attention`. As rollouts end, those that are left, drawn at random, share less.
Both sides take turns, and their results are held against each other first. Memory is what the keys
and values take; the last column is what decoding does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from zppo_mm.models.layers.shared_attention import PromptGroups, attend, is_worth_sharing

KV_HEADS, QUERY_HEADS = 2, 4
LENGTHS = ((40, 16), (200, 32), (200, 256), (1000, 128), (4000, 256))
FRACTIONS_LEFT = (1.0, 0.75, 0.5, 0.25, 0.125)
MAX_DIFFERENCE = {"float32": 1e-5, "bfloat16": 2e-2}


def medians(sides: list[Callable[[], torch.Tensor]], rounds: int) -> list[float]:
    """Return each side's median microseconds; sides take turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            side()
            taken.append(time.perf_counter() - started)
    return [1e6 * statistics.median(taken[rounds // 10 :]) for taken in seconds]


@torch.inference_mode()
def main() -> None:
    """Measure all lengths and print one line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=MAX_DIFFERENCE)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    known = parser.parse_args()
    dtype, device = getattr(torch, known.dtype), torch.device("cpu")
    print(
        "| prompt tokens | own tokens | sequences | copies, us | shared, us | ratio | copies, MB | "
        "shared, MB | decoding |"
    )
    print("|---" * 9 + "|")
    for (length, own_length), left in product(LENGTHS, FRACTIONS_LEFT):
        batch = max(1, round(known.prompts * known.rollouts * left))
        drawn = sorted(torch.randperm(known.prompts * known.rollouts)[:batch].tolist())
        rows_of_prompts = {
            prompt: index
            for index, prompt in enumerate(sorted({row // known.rollouts for row in drawn}))
        }
        owners = [rows_of_prompts[row // known.rollouts] for row in drawn]
        queries = torch.randn(batch, KV_HEADS, QUERY_HEADS, known.head_dim, dtype=dtype)
        prompt = [
            torch.randn(len(rows_of_prompts), KV_HEADS, length, known.head_dim, dtype=dtype)
            for _ in range(2)
        ]
        own = [
            torch.randn(batch, KV_HEADS, own_length, known.head_dim, dtype=dtype) for _ in range(2)
        ]
        copies = [
            torch.cat([part[owners], tail], 2) for part, tail in zip(prompt, own, strict=True)
        ]
        prompts = PromptGroups.build(owners, [length] * len(rows_of_prompts), device, dtype)
        copied = partial(F.scaled_dot_product_attention, queries, *copies)
        shared = partial(attend, queries, (prompt[0], prompt[1]), (own[0], own[1]), prompts)
        difference = (copied() - shared()).abs().max()
        assert difference <= MAX_DIFFERENCE[known.dtype], f"results differ by {difference}"
        times = medians([copied, shared], known.rounds)
        megabytes = [sum(part.nbytes for part in parts) / 1e6 for parts in (copies, prompt + own)]
        choice = "shared" if is_worth_sharing(owners, length, device) else "copies"
        figures = (
            f"{times[0]:.0f} | {times[1]:.0f} | {times[0] / times[1]:.2f} | {megabytes[0]:.1f} | "
            f"{megabytes[1]:.1f}"
        )
        print(f"| {length} | {own_length} | {batch} | {figures} | {choice} |", flush=True)


if __name__ == "__main__":
    main()

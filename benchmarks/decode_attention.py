"""One decoding step's attention to prompts that rollouts share, beside attention to a copy of the prompt per rollout.

    python benchmarks/decode_attention.py [--device cpu] [--dtype float32] [--prompts 8] [--rollouts 8] [--head-dim 64] [--rounds 200]

Two key heads of four query heads each; one layer. Copies are read by `scaled_dot_product_attention`, as decoding did before prompts were
shared. Both sides take turns, and their results are held against each other first. Memory is what the keys and values take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from zppo_mm.models.shared_attention import PromptGroups, attend

KEY_HEADS, QUERY_HEADS = 2, 4
LENGTHS = ((40, 16), (200, 32), (200, 256), (1000, 128), (4000, 256))
MAX_DIFFERENCE = {"float32": 1e-5, "bfloat16": 2e-2}


def medians(sides: list[Callable[[], torch.Tensor]], rounds: int, device: torch.device) -> list[float]:
    """Return each side's median microseconds; sides take turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    return [1e6 * statistics.median(taken[rounds // 10 :]) for taken in seconds]


@torch.inference_mode()
def main() -> None:
    """Measure all lengths and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=MAX_DIFFERENCE)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    known = parser.parse_args()
    device, dtype = torch.device(known.device), getattr(torch, known.dtype)
    batch, options = known.prompts * known.rollouts, {"device": device, "dtype": dtype}
    owners = [row // known.rollouts for row in range(batch)]
    print("| prompt tokens | own tokens | copies, us | shared, us | ratio | copies, MB | shared, MB |\n|---|---|---|---|---|---|---|")
    for length, own_length in LENGTHS:
        queries = torch.randn(batch, KEY_HEADS, QUERY_HEADS, known.head_dim, **options)
        prompt = tuple(torch.randn(known.prompts, KEY_HEADS, length, known.head_dim, **options) for _ in range(2))
        own = tuple(torch.randn(batch, KEY_HEADS, own_length, known.head_dim, **options) for _ in range(2))
        copies = tuple(torch.cat([part[owners], tail], 2) for part, tail in zip(prompt, own, strict=True))
        prompts = PromptGroups.build(owners, [length] * known.prompts, device, dtype)
        sides = [lambda: F.scaled_dot_product_attention(queries, *copies), lambda: attend(queries, prompt, own, prompts)]  # noqa: B023
        difference = (sides[0]() - sides[1]()).abs().max()
        assert difference <= MAX_DIFFERENCE[known.dtype], f"results differ by {difference}"
        copied, shared = medians(sides, known.rounds, device)
        megabytes = [sum(part.nbytes for part in parts) / 1e6 for parts in (copies, prompt + own)]
        print(
            f"| {length} | {own_length} | {copied:.0f} | {shared:.0f} | {copied / shared:.2f} | {megabytes[0]:.1f} | {megabytes[1]:.1f} |"
        )


if __name__ == "__main__":
    main()

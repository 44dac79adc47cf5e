"""One decoding step's attention to a cache in blocks whose prompts are shared, beside attention to
contiguous keys with a copy of the prompt per rollout.

    python benchmarks/decode_attention.py [--dtype float32] [--prompts 8] [--rollouts 8] [--head-dim
    64] [--slots 128] [--plain] [--rounds 200]

Two KV heads of four query heads each; one layer. Copies are read by
`scaled_dot_product_attention`. As rollouts end, those that are left, drawn at random, share less.
`--plain` reads blocks by matrix products, as on a GPU. Both sides take turns, and their results
are held against each other first. Memory is what the keys and values take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from zppo_mm.models.layers import paged_attention
from zppo_mm.models.layers.cache import SLOTS_PER_BLOCK, Admission, DecodeCache

KV_HEADS, QUERY_HEADS = 2, 4
LENGTHS = ((40, 16), (200, 32), (200, 256), (1000, 128), (4000, 256))
FRACTIONS_LEFT = (1.0, 0.75, 0.5, 0.25, 0.125)
MAX_DIFFERENCE = {"float32": 1e-5, "bfloat16": 2e-2}


def medians(sides: list[Callable[[], torch.Tensor]], rounds: int) -> list[float]:
    """Return each side's median microseconds of CPU time; sides take turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.process_time()
            side()
            taken.append(time.process_time() - started)
    return [1e6 * statistics.median(taken[rounds // 10 :]) for taken in seconds]


def filled_cache(
    lengths: tuple[int, int], known: argparse.Namespace, dtype: torch.dtype
) -> tuple[DecodeCache, torch.Tensor, torch.Tensor]:
    """Return a cache of all rollouts after their last step, and the keys and values of prompts and
    of rollouts, `[2, prompts or rollouts, tokens, KV heads, head_dim]`.
    """
    (length, own_length), rollouts = lengths, known.rollouts
    shape = KV_HEADS, known.head_dim
    prompts = torch.randn(2, known.prompts, length, *shape).to(dtype)
    own = torch.randn(2, known.prompts * rollouts, own_length, *shape).to(dtype)
    num_blocks = known.prompts * -(-length // known.slots)
    num_blocks += own.shape[1] * -(-own_length // known.slots)
    cache = DecodeCache(num_blocks, own.shape[1], known.slots)
    for prompt, rollout in product(range(known.prompts), range(rollouts)):
        row = prompt * rollouts + rollout
        pair = torch.cat([prompts[:, prompt], own[:, row, :-1]], 1)
        bounds = torch.tensor([0, pair.shape[1]], dtype=torch.int32)
        cache.begin(bounds, [Admission(prompt, length)], dtype)
        cache.store_attention(0, *pair)
    return cache, prompts, own


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
    parser.add_argument("--slots", type=int, default=SLOTS_PER_BLOCK, help="tokens of a block")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--rounds", type=int, default=200)
    known = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, known.dtype)
    if known.plain:
        paged_attention.read = paged_attention.read_plainly
    print(
        "| prompt tokens | own tokens | sequences | copies, us | blocks, us | ratio | copies, MB | "
        "blocks, MB |"
    )
    print("|---" * 8 + "|")
    for lengths, left in product(LENGTHS, FRACTIONS_LEFT):
        cache, prompts, own = filled_cache(lengths, known, dtype)
        rows = list(range(cache.batch_size))
        gone = torch.randperm(len(rows))[round(len(rows) * left) :].sort().values.numpy()
        moves = cache.release(gone)
        for target, source in zip(moves.targets, moves.sources, strict=True):
            rows[target] = rows[source]
        rows = rows[: len(rows) - len(gone)]
        cache.extend(torch.device("cpu"))
        assert cache.tail is not None
        blocks, slots = cache.tail
        for held, new in zip(cache.attention[0], own[:, rows, -1], strict=True):
            held[blocks, :, slots] = new
        owners = np.array(rows) // known.rollouts
        copies = torch.cat([prompts[:, owners], own[:, rows]], 2).transpose(2, 3).contiguous()
        queries = torch.randn(len(rows), KV_HEADS, QUERY_HEADS, known.head_dim, dtype=dtype)
        copied = partial(F.scaled_dot_product_attention, queries, copies[0], copies[1])
        assert cache.empty is not None
        assert cache.reads is not None
        keys, values = cache.attention[0]
        in_blocks = partial(paged_attention.attend, queries, keys, values, cache.empty, cache.reads)
        difference = (copied() - in_blocks()).abs().max()
        assert difference <= MAX_DIFFERENCE[known.dtype], f"results differ by {difference}"
        times = medians([copied, in_blocks], known.rounds)
        used = cache.attention[0][:, : cache.num_blocks - cache.num_free_blocks].nbytes
        print(
            f"| {lengths[0]} | {lengths[1]} | {len(rows)} | {times[0]:.0f} | {times[1]:.0f} | "
            f"{times[0] / times[1]:.2f} | {copies.nbytes / 1e6:.1f} | {used / 1e6:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Memory and time of the output layer and the log-probs, by chunks of rows and for all at once.

    python benchmarks/output_layer.py [--tokens 4096] [--vocabulary 248320] [--hidden 1024]

Forward and backward pass from hidden states to the gradients of hidden states and weight, each way
in a process of its own. The memory is how far the process's peak lies above what it held before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import NamedTuple

import psutil
import torch

from zppo_mm.algorithms.logprobs import token_statistics
from zppo_mm.algorithms.row_loss import MAX_CHUNK_LOGITS_CPU, OutputRows
from zppo_mm.text_table import text_table


class Cost(NamedTuple):
    """Of one forward and backward pass."""

    mebibytes: float
    cpu_seconds: float
    loss: float


def measure(size: tuple[int, int, int], dtype: torch.dtype, max_chunk_logits: int) -> Cost:
    """Run one pass in this process."""
    torch.set_num_threads(1)
    tokens, vocabulary, width = size
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=random).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=random) / width).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=random)

    def row_loss(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        found = token_statistics(logits, targets[rows])
        return -found.logprobs.sum(), found.entropies.detach().sum().double()

    before, began = psutil.Process().memory_info().rss / 2**20, time.process_time()
    rows = OutputRows(hidden, weight, max_chunk_logits)
    if max_chunk_logits:
        loss, _ = rows.sum(row_loss)
    else:
        loss, _ = row_loss(rows.logits(slice(None)), slice(None))
    loss.backward()  # type: ignore[no-untyped-call]
    return Cost(_peak() - before, time.process_time() - began, float(loss.detach()))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a row per data type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=248_320)
    parser.add_argument("--hidden", type=int, default=1024)
    arguments = parser.parse_args()
    size = (arguments.tokens, arguments.vocabulary, arguments.hidden)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        costs = []
        for chunk in (0, MAX_CHUNK_LOGITS_CPU):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                costs.append(pool.apply(measure, (size, dtype, chunk)))
        whole, chunked = costs
        rows.append(
            [
                str(dtype).removeprefix("torch."),
                f"{whole.mebibytes:,.0f} MiB",
                f"{chunked.mebibytes:,.0f} MiB",
                f"{whole.mebibytes / chunked.mebibytes:.1f}",
                f"{whole.cpu_seconds:.1f} s",
                f"{chunked.cpu_seconds:.1f} s",
                f"{abs(whole.loss - chunked.loss) / abs(whole.loss):.1e}",
            ]
        )
    head = ["", "all rows", "chunks", "ratio", "CPU, all rows", "CPU, chunks", "loss differs by"]
    print(text_table(head, rows))


if __name__ == "__main__":
    main()

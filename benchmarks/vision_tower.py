"""Memory and time of the vision tower's forward and backward pass, with and without recomputation.

    python benchmarks/vision_tower.py [--depth 8] [--grid 8 16 16] [--rounds 3]

Random towers of Qwen3.5's widths in bfloat16, each way in a process of its own, in turn. The memory
is how far the process's peak lies above what it held before the pass.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from statistics import median
from typing import NamedTuple

import psutil
import torch

from encoders.tower import VisionTower
from encoders.tower_memory import tower_activations
from zppo_mm.text_table import text_table

SIZES = {
    "0.8B": {"hidden_size": 768, "num_heads": 12, "intermediate_size": 3072},
    "9B": {"hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304},
}
"""Hidden size, heads and MLP of the towers of two students."""


class Cost(NamedTuple):
    """Of one forward and backward pass."""

    mebibytes: float
    cpu_seconds: float
    gradient_norm: float


def measure(name: str, depth: int, grid: tuple[int, int, int], recompute: bool) -> Cost:
    """Run one pass in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Weights that began in float32 would be the process's peak.
    torch.set_default_dtype(torch.bfloat16)
    tower = VisionTower(
        "qwen3_5", {**SIZES[name], "depth": depth}, torch.bfloat16, recompute=recompute
    )
    config = tower.model.config
    elements = config.in_channels * config.temporal_patch_size * config.patch_size**2
    grids = torch.tensor([grid])
    patches = torch.randn(int(grids.prod()), elements).bfloat16()
    # Gradients exist before, as in training, and one small pass has loaded the kernels.
    tower(patches[:4], torch.tensor([[1, 2, 2]])).sum().backward()
    tower.zero_grad(set_to_none=False)
    torch.set_default_dtype(torch.float32)
    before, began = psutil.Process().memory_info().rss / 2**20, time.process_time()
    tower(patches, grids).float().square().sum().backward()
    norm = torch.stack([p.grad.float().norm() for p in tower.parameters() if p.grad is not None])
    return Cost(_peak() - before, time.process_time() - began, float(norm.norm()))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print a row per tower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--grid", type=int, nargs=3, default=[8, 16, 16], help="t h w in patches")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    num_patches = arguments.grid[0] * arguments.grid[1] * arguments.grid[2]
    rows = []
    for name in SIZES:
        costs: dict[bool, list[Cost]] = {False: [], True: []}
        for _ in range(arguments.rounds):
            for recompute, found in costs.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found.append(
                        pool.apply(
                            measure, (name, arguments.depth, tuple(arguments.grid), recompute)
                        )
                    )
        kept, again = (
            Cost(*(median(values) for values in zip(*found, strict=True)))
            for found in costs.values()
        )
        counted = tower_activations("qwen3_5", {**SIZES[name], "depth": arguments.depth})
        rows.append(
            [
                name,
                *(
                    f"{counted.peak(recompute) * num_patches / 2**20:,.0f} MiB"
                    for recompute in costs
                ),
                f"{kept.mebibytes:,.0f} MiB",
                f"{again.mebibytes:,.0f} MiB",
                f"{kept.cpu_seconds:.1f} s",
                f"{again.cpu_seconds:.1f} s",
                f"{again.cpu_seconds / kept.cpu_seconds:.2f}",
                str(kept.gradient_norm == again.gradient_norm),
            ]
        )
    head = ["tower", "counted", "recomputed", "measured", "recomputed", "CPU", "recomputed"]
    print(text_table([*head, "ratio", "equal gradients"], rows))


if __name__ == "__main__":
    main()

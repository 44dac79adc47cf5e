"""Where the CPU time of one of our GRPO steps goes, and what it would be at the rate of the
machine's matrix products.

    python benchmarks/grpo_step_material.py FOLDER
    python benchmarks/step_profile.py FOLDER [--family qwen3_5] [--dtype float32]

The step is that of `grpo_step.py`, on one thread. Times are CPU seconds, so that other work on the
machine does not count; those by kind of work are added up over the calls of torch's operations in
one further step, and what is not inside an operation is Python's. Floating-point operations are
counted from the shapes of the products with weights. Each size that occurred is then measured by
itself, and so is a large product.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from grpo_step_ours import TimedEngine, build
from torch.utils._python_dispatch import TorchDispatchMode

from zppo_mm.parallel import groups as parallel
from zppo_mm.step import run_step
from zppo_mm.text_table import text_table
from zppo_mm.training.policy import Policy

GEMM_SECONDS = 0.05
"""Every matrix size is repeated for at least so long."""
LARGE_GEMM = (2048, 2048, 2048)
KINDS = (
    ("products with weights", ("mm", "addmm", "addmm_", "linear")),
    ("small products", ("bmm", "matmul", "baddbmm", "linalg_solve_triangular")),
    ("attention", ("_scaled_dot_product", "scaled_dot_product_attention")),
    ("convolution", ("convolution", "mkldnn_convolution")),
    ("copies", ("copy_", "_to_copy", "clone", "cat", "stack", "index", "gather", "constant_pad")),
)
OTHER = "element by element"

GemmSize = tuple[int, int, int]


def kind_of(operation: str) -> str:
    """Return the kind of work of an operation of `torch.ops.aten`."""
    for kind, names in KINDS:
        if any(
            operation == name or (len(name) > 4 and operation.startswith(name)) for name in names
        ):
            return kind
    return OTHER


@dataclass
class Profile:
    """What was computed while a `Recorder` was active.

    Attributes:
        seconds: CPU seconds by kind of work.
        sizes: How often each product with a weight occurred, rows x inner x columns.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[GemmSize, torch.dtype]] = field(default_factory=Counter)

    def operations(self) -> float:
        """Return the floating-point operations of the products with weights."""
        return sum(count * num_operations(size) for (size, _), count in self.sizes.items())

    def seconds_at_best(self) -> float:
        """Return what the same products take by themselves, one size after another."""
        return sum(count * gemm_seconds(*key) for key, count in self.sizes.items())


class Recorder(TorchDispatchMode):
    """Adds every operation inside the `with` block to a profile, the backward pass included."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._profile = profile

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and time it."""
        began = time.thread_time()
        result = func(*args, **(kwargs or {}))
        kind = kind_of(name := func.overloadpacket.__name__)
        self._profile.seconds[kind] += time.thread_time() - began
        if name in KINDS[0][1]:
            left, right = args[:2] if name == "linear" else args[-2:]
            columns = right.shape[0 if name == "linear" else 1]
            size = (left.numel() // left.shape[-1], left.shape[-1], columns)
            self._profile.sizes[size, left.dtype] += 1
        return result


def num_operations(size: GemmSize) -> int:
    """Return the multiplications and additions of a product."""
    rows, inner, columns = size
    return 2 * rows * inner * columns


def gemm_seconds(size: GemmSize, dtype: torch.dtype) -> float:
    """Return the CPU seconds of one product, its operands and its result in memory that was used
    before.
    """
    rows, inner, columns = size
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    result = torch.empty(rows, columns, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        count, began = 0, time.thread_time()
        while (spent := time.thread_time() - began) < GEMM_SECONDS / 3 or not count:
            torch.mm(left, right, out=result)
            count += 1
        best = min(best, spent / count)
    return best


def large_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a large product."""
    return num_operations(LARGE_GEMM) / gemm_seconds(LARGE_GEMM, dtype)


@dataclass
class Watched:
    """A method that adds up its CPU seconds, or records what it computes."""

    method: Callable[..., Any]
    profile: Profile = field(default_factory=Profile)
    records: bool = False
    seconds: float = 0.0

    def attach(self, owner: type, name: str) -> None:
        """Put this in the place of the method."""

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            if self.records:
                with Recorder(self.profile):
                    return self.method(*arguments, **named)
            result = self.method(*arguments, **named)
            self.seconds = time.process_time() - began
            return result

        setattr(owner, name, call)


def row(name: str, watched: Watched, best: float) -> list[str]:
    """Return what is printed of sampling or the update."""
    profile, seconds = watched.profile, watched.seconds
    kinds = [kind for kind, _ in KINDS] + [OTHER]
    times = [profile.seconds[kind] for kind in kinds]
    return [
        name,
        f"{seconds:.2f}",
        f"{profile.operations() / 1e9:.0f}",
        f"{profile.operations() / best / seconds:.0%}",
        f"{profile.seconds_at_best():.2f}",
        *(f"{time:.2f}" for time in (*times, max(0.0, seconds - sum(times)))),
    ]


def main() -> None:
    """Run three steps, record a fourth, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=["qwen3_5", "qwen3"], default="qwen3_5")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sampling, update = Watched(TimedEngine.generate), Watched(Policy.train_step)
    sampling.attach(TimedEngine, "generate")
    update.attach(Policy, "train_step")
    run, stages, _ = build(arguments.folder, arguments.family, arguments.dtype, 2048, "always")
    for step in range(1, 4):
        run_step(stages, step)
    sampling.records = update.records = True
    run_step(stages, 4)
    best = large_rate(getattr(torch, arguments.dtype))
    print(f"a large product: {best / 1e9:.0f} GFLOP/s")
    head = ["", "CPU seconds", "GFLOP", "of that rate", "products alone"]
    kinds = [*(kind for kind, _ in KINDS), OTHER, "Python and the rest"]
    rows = [row("sampling", sampling, best), row("update", update, best)]
    print(text_table([*head, *kinds], rows))
    run.close()
    parallel.shutdown()


if __name__ == "__main__":
    main()

"""Peak host memory of every rank while a checkpoint is saved and loaded.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_memory.py [--width 512] [--params-dtype
    bfloat16] [--whole] [--tensor 1]

A random Qwen3.5 whose optimizer has moments; no training. `shard` is what a rank writes: all
weights, float32 copies and moments, divided by the number of ranks. Resident memory is reset before
each phase (Linux), so `save` and `load` are the most above what was resident before, processes that
the rank starts not counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sampling import random_model
from transformers import Qwen3_5ForConditionalGeneration

from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.shared import load_model
from zppo_mm.training import checkpoint
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy


def write_model(folder: Path, width: int) -> None:
    """Write a wider random network than the other benchmarks have."""
    config = random_model().config
    text = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 32_768}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = width
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)


def resident(name: str) -> int:
    """Return a line of the process's memory in bytes: VmRSS now, VmHWM the most since the reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_of(work: Callable[[], object]) -> tuple[int, float]:
    """Return the most memory beyond the start while something is done, and its seconds."""
    parallel.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    work()
    return resident("VmHWM") - before, time.perf_counter() - started


def with_moments(policy: Policy, dtype: str = "float32") -> Policy:
    """Give every trained parameter the moments that an update would."""
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                moments = {
                    name: torch.full_like(main, 0.5, dtype=getattr(torch, dtype))
                    for name in ("exp_avg", "exp_avg_sq")
                }
                part.optimizer.state[main] = {"step": torch.tensor(1.0), **moments}
    return policy


def measure(folder: Path, layout: ParallelConfig, dtype: str) -> dict[str, float]:
    """Return megabytes and seconds of a save and a load on this rank."""
    model = load_model(ModelConfig(params_dtype=dtype), layout, folder / "model", trainable=True)
    objective = PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
    policy = with_moments(Policy(model, TrainConfig(), layout, objective))
    saved, seconds = peak_of(
        lambda: checkpoint.save(folder / "run", 1, policy, {"step": 1}, keep=1)
    )
    loaded, load_seconds = peak_of(lambda: checkpoint.load_latest(folder / "run", policy))
    size = sum(path.stat().st_size for path in (folder / "run" / "step_000001").iterdir())
    found = {
        "shard MB": size / parallel.world_size() / 1e6,
        "save MB": saved / 1e6,
        "load MB": loaded / 1e6,
    }
    return {**found, "save s": seconds, "load s": load_seconds}


def main() -> None:
    """Print one line per rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--params-dtype", default="bfloat16")
    parser.add_argument("--whole", action="store_true", help="without the distributed optimizer")
    parser.add_argument("--tensor", type=int, default=1)
    options = parser.parse_args()
    layout = ParallelConfig(
        use_distributed_optimizer=not options.whole, tensor_model_parallel_size=options.tensor
    )
    parallel.initialize(layout, seed=0)
    folder = Path(parallel.broadcast_object(tempfile.mkdtemp() if parallel.rank() == 0 else None))
    if parallel.rank() == 0:
        write_model(folder / "model", options.width)
    parallel.barrier()
    found = parallel.gather_from_ranks(measure(folder, layout, options.params_dtype))
    if parallel.rank() == 0:
        for rank, values in enumerate(found):
            print(
                f"rank {rank}: "
                + "  ".join(f"{name} {value:.1f}" for name, value in values.items())
            )
    parallel.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

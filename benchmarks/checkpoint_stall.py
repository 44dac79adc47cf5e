"""How long a save stops training: until the copy in host memory is made, and until the checkpoint
is complete.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py [--width 512] [--rounds 5]
        [--params-dtype bfloat16] [--moments-dtype float32]

A random Qwen3.5 whose optimizer has moments, on one disk. In turns, so that a busy machine slows
all alike: `copy` clones the tensors that a rank saves and nothing else; `stall` is
`CheckpointWriter.save` with no save under way, which is what training waits for; `second` is the
same straight after, which waits for the first, or with a staging folder until that has its files;
`complete` is `CheckpointWriter.finish` then. A synchronous save would take `stall` and `complete`.
Seconds, medians over the rounds of the slowest rank; `CPU` is of the thread that trains, in
`stall`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from checkpoint_memory import with_moments, write_model

from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.shared import load_model
from zppo_mm.training.checkpoint_writer import CheckpointWriter
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.optimizer_state import parameter_shards
from zppo_mm.training.policy import Policy


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds and CPU seconds of this thread."""
    parallel.barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def clone_state(policy: Policy) -> None:
    """Copy what this rank holds of weights and optimizer."""
    states = [part.tensors().values() for part in parameter_shards(policy.optimizer)]
    copies = [parameter.detach().clone() for parameter in policy.model.parameters()]
    copies += [tensor.clone() for tensors in states for tensor in tensors]


def measure(policy: Policy, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return this rank's seconds by name."""
    writers = {
        "direct": CheckpointWriter(folder / "direct", 1),
        "staged": CheckpointWriter(folder / "staged", 1, staging=folder / "staging"),
    }
    found = defaultdict(list)
    for step in range(1, rounds + 2):
        found["copy"].append(timed(lambda: clone_state(policy))[0])
        for name, writer in writers.items():
            save = partial(writer.save, step, policy, {"step": step})
            seconds, cpu = timed(save)
            found[f"{name} stall"].append(seconds)
            found[f"{name} CPU"].append(cpu)
            found[f"{name} second"].append(timed(save)[0])
            found[f"{name} complete"].append(timed(writer.finish)[0])
    return {name: values[1:] for name, values in found.items()}  # the first warms up


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--params-dtype", default="bfloat16")
    parser.add_argument("--moments-dtype", default="float32")
    options = parser.parse_args()
    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(parallel.broadcast_object(name))
        if parallel.rank() == 0:
            write_model(folder / "model", options.width)
        parallel.barrier()
        model = load_model(
            ModelConfig(params_dtype=options.params_dtype), layout, folder / "model", trainable=True
        )
        objective = PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
        train = TrainConfig(optimizer_state_dtype=options.moments_dtype)
        policy = with_moments(Policy(model, train, layout, objective), options.moments_dtype)
        ranks = parallel.gather_from_ranks(measure(policy, folder / "run", options.rounds))
        if parallel.rank() == 0:
            saved = next((folder / "run" / "direct").iterdir())
            size = sum(path.stat().st_size for path in saved.iterdir())
            slowest = {
                key: statistics.median(map(max, zip(*(each[key] for each in ranks), strict=True)))
                for key in ranks[0]
            }
            print(f"{size / 1e6:.1f} MB  ", "  ".join(f"{k} {v:.3f}" for k, v in slowest.items()))
        parallel.barrier()
    parallel.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

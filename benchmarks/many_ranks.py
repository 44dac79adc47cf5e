"""How start-up, the exchange of groups and checkpoints grow with the number of ranks.

    OMP_NUM_THREADS=1 python benchmarks/many_ranks.py [--ranks 2 4 8 16 32]
    python benchmarks/many_ranks.py --count

Runs of the bundled tiny model for three steps of equal size, tensor and pipeline size 2 (of two
ranks tensor size 2), the rest data parallel, all ranks on this machine. They are forked from one
process that has imported everything, so memory is what a rank has for itself. All ranks share the
processors: CPU time says what the work is, seconds say little.

`--count` counts what an exchange of groups takes at the paper's batch, 256 replicas of 4 ranks.
"""

from __future__ import annotations

import argparse
import pickle
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from tests.support.launch import run_ranks
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.experience import Prompt, Rollout
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.grading import Outcome
from zppo_mm.text_table import text_table
from zppo_mm.train import train

STEPS = 3
OPTIONS = (
    "modality=text",
    f"train.train_iters={STEPS}",
    "train.num_new_questions=32",
    "train.updates_per_step=2",
    "rollout.num_rollouts=4",
    "rollout.max_response_tokens=32",
    "teacher.num_rollouts=2",
    "evaluation.num_questions=8",
    "evaluation.interval=0",
    "checkpoint.interval=1",
    "observability.report=false",
    "observability.tensorboard=false",
    "parity.mode=none",
    "parallel.timeout_minutes=20",
)
NUM_GROUPS, NUM_ROLLOUTS = 384 + 96 + 96, 8
"""Of a step of the paper: new questions, replayed and reformulated ones."""
TOKENS_EXCHANGED, EXCHANGES = 64, 5
NUM_REPLICAS, MODEL_SIZE, PROMPT_TOKENS = 256, 4, 1024


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def own_mib() -> float:
    return float(psutil.Process().memory_full_info().uss) / 2**20


def measured(work: Callable[[], object]) -> float:
    """Return the CPU seconds of some work on this rank."""
    started = cpu_seconds()
    work()
    return cpu_seconds() - started


def exchange() -> None:
    mine = NUM_GROUPS * NUM_ROLLOUTS // parallel.num_replicas()
    group = [
        (np.zeros(TOKENS_EXCHANGED, np.int64), np.zeros(TOKENS_EXCHANGED, np.float32))
        for _ in range(mine)
    ]
    for _ in range(EXCHANGES):
        assert len(parallel.gather_from_replicas(group)) == parallel.num_replicas()


def outcome(response_tokens: int) -> Outcome:
    """Return what replicas exchange of one group."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 150_000, PROMPT_TOKENS)
    rollouts = [
        Rollout(
            draw.integers(0, 150_000, response_tokens),
            draw.random(response_tokens, dtype=np.float32),
            "stop",
            "four" * response_tokens,
            "1",
            1.0,
            1,
        )
        for _ in range(NUM_ROLLOUTS)
    ]
    positions = np.zeros((3, PROMPT_TOKENS), np.int64)
    return Outcome(0, Prompt("four" * PROMPT_TOKENS, ids, positions, 0), tuple(rollouts))


def count(response_tokens: int) -> list[str]:
    """Return one line of the table of what an exchange takes: GiB of the groups themselves, and of
    the room for it, over all ranks and over leaders.
    """
    size = len(pickle.dumps([outcome(response_tokens)])) / 2**30
    longest = size * -(-NUM_GROUPS // NUM_REPLICAS)
    rooms = (NUM_GROUPS * size, NUM_REPLICAS * MODEL_SIZE * longest, NUM_REPLICAS * longest)
    return [str(response_tokens), *(f"{each:.2f}" for each in rooms)]


def measure(config: RunConfig) -> dict[str, float]:
    """Measure one rank of a run."""
    started = time.perf_counter()
    result = {"start-up": measured(lambda: parallel.initialize(config.parallel, config.seed))}
    result["start-up, seconds"] = time.perf_counter() - started
    result["exchange"] = measured(exchange) / EXCHANGES
    result["run"] = measured(lambda: train(config))
    result["own MiB"] = own_mib()
    return result


def row(ranks: int) -> list[str]:
    """Return one line of the table."""
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2 if ranks > 2 else 1}
    layout = [f"parallel.{name}={size}" for name, size in sizes.items()]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [*OPTIONS, *layout, f"output_dir={folder}", "name=run"])
        started = time.perf_counter()
        results = run_ranks(measure, ranks, config, timeout_seconds=3600)
        seconds = time.perf_counter() - started
        checkpoint = Path(folder) / "run" / "checkpoints" / f"step_{STEPS:06d}"
        files = [path.stat().st_size for path in checkpoint.iterdir()]
    means = {name: float(np.mean([each[name] for each in results])) for name in results[0]}
    return [
        str(ranks),
        f"{1000 * means['start-up']:.0f}",
        f"{means['start-up, seconds']:.1f}",
        f"{1000 * means['exchange']:.0f}",
        f"{means['run']:.1f}",
        f"{ranks * means['run']:.0f}",
        f"{means['own MiB']:.0f}",
        f"{len(files)}",
        f"{sum(files) / 2**20:.1f}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    if options.count:
        head = ["response tokens", "groups", "room over all ranks", "over leaders"]
        print(text_table(head, [count(tokens) for tokens in (4096, 12_288)]))
        return
    header = [
        "ranks",
        "start-up, CPU ms a rank",
        "seconds",
        "exchange, CPU ms a rank",
        "run, CPU s a rank",
        "all ranks",
        "own MiB a rank",
        "files of a checkpoint",
        "MiB",
        "seconds in all",
    ]
    for ranks in options.ranks:
        print(text_table(header, [row(ranks)]), flush=True)


if __name__ == "__main__":
    main()

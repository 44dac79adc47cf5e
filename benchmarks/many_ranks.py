"""How the costs of a run grow with its processes: start, exchange of groups, step, checkpoint.

    OMP_NUM_THREADS=1 python benchmarks/many_ranks.py [--ranks 2 4 8 16 32] [--fresh]
        [--spare-gib 3]

The bundled tiny student and teacher on text questions, three steps of the same batch whatever the
ranks, gloo. Tensor size 2, then pipeline size 2, then replicas. The responses must be the same at
every layout.

Processes are forked from one that has imported everything (`--fresh` starts each by itself), so
that many fit into memory. A layout is left out if the one before says that it would not leave
`--spare-gib` of memory, and is ended if less is left.

CPU seconds are those of all threads of a rank, the mean over ranks: on fewer cores than ranks they
say what wall-clock seconds cannot. `PSS` shares pages among the processes that map them, workers of
a rank counted with it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from zppo_mm.text_table import text_table

STEPS = 3
LAYOUTS = {1: (1, 1), 2: (2, 1)}
"""Tensor and pipeline size by ranks; (2, 2) for more."""
OPTIONS = (
    "modality=text",
    "name=run",
    f"train.train_iters={STEPS}",
    "train.num_new_questions=16",
    "train.updates_per_step=2",
    "rollout.num_rollouts=4",
    "rollout.max_response_tokens=32",
    "teacher.num_rollouts=2",
    "evaluation.interval=0",
    "evaluation.num_questions=2",
    "parity.mode=none",
    "observability.report=false",
    "observability.trackers=[]",
    "checkpoint.interval=1",
)
GIB = 2**30
LIMIT_SECONDS = 1800


def cpu_seconds() -> float:
    """Return processor seconds of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def layout(ranks: int) -> tuple[int, int]:
    """Return tensor and pipeline size."""
    return LAYOUTS.get(ranks, (2, 2))


def run_rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    """Train as one rank of a job, and write what each part took."""
    started = time.time(), cpu_seconds()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with (folder / f"{rank}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)

    import torch

    from zppo_mm import train
    from zppo_mm.config.load import load_config
    from zppo_mm.parallel import groups
    from zppo_mm.run import session
    from zppo_mm.training.checkpoint_writer import CheckpointWriter

    torch.set_num_threads(1)
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def timed(owner: Any, name: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), cpu_seconds()
            try:
                return work(*arguments, **named)
            finally:
                taken[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))

        setattr(owner, name, call)

    for owner, name in (
        (groups, "initialize"),
        (groups, "gather_with_flag"),
        (session, "build_run"),
        (train, "run_step"),
        (CheckpointWriter, "save"),
        (CheckpointWriter, "finish"),
    ):
        timed(owner, name)
    taken["import"].append((time.time() - started[0], cpu_seconds() - started[1]))
    tensor, pipeline = layout(ranks)
    config = load_config(
        None,
        [
            *(*OPTIONS, f"output_dir={folder}"),
            f"parallel.tensor_model_parallel_size={tensor}",
            f"parallel.pipeline_model_parallel_size={pipeline}",
        ],
    )
    train.train(config)
    taken["all"].append((time.time() - started[0], cpu_seconds()))
    (folder / f"{rank}.json").write_text(json.dumps(taken))


def memory_of(processes: Sequence[BaseProcess]) -> list[int]:
    """Return the PSS of every rank and the processes that it started, bytes."""
    found = []
    for process in processes:
        family = []
        try:
            rank = psutil.Process(process.pid)
            for each in (rank, *rank.children(recursive=True)):
                family.append(each.memory_full_info().pss)
        except psutil.Error:
            continue
        found.append(sum(family))
    return found


def run_layout(ranks: int, folder: Path, method: str, spare: float) -> list[int]:
    """Run to the end; returns the most memory seen, by rank.

    Raises:
        SystemExit: A rank failed, the time was over, or memory ran short.
    """
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["zppo_mm.train"])
    port = 20_000 + os.getpid() % 10_000
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, port, folder)) for rank in range(ranks)
    ]
    short = threading.Event()
    for process in processes:
        process.start()
    watch = threading.Thread(target=end_if_short, args=(processes, spare, short), daemon=True)
    watch.start()
    most: list[int] = []
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(process.is_alive() for process in processes):
        now = memory_of(processes)
        most = now if sum(now) > sum(most) else most
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            end(processes)
        time.sleep(2)
    if short.is_set() or any(process.exitcode for process in processes):
        logs = "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(ranks))
        why = "memory ran short" if short.is_set() else "a rank failed"
        raise SystemExit(f"many_ranks: {why} with {ranks} ranks\n{logs}")
    return most


def end_if_short(processes: Sequence[BaseProcess], spare: float, short: threading.Event) -> None:
    """End all ranks as soon as too little memory is left."""
    while any(process.is_alive() for process in processes):
        if psutil.virtual_memory().available < spare:
            short.set()
            end(processes)
            return
        time.sleep(0.2)


def end(processes: Sequence[BaseProcess]) -> None:
    """Kill the ranks and what they started."""
    for process in processes:
        try:
            family = psutil.Process(process.pid).children(recursive=True)
        except psutil.Error:
            continue
        process.kill()
        for each in family:
            each.send_signal(signal.SIGKILL)


def row(ranks: int, folder: Path, memory: Sequence[int]) -> list[str]:
    """Return a line of the table."""
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]

    def cpu(name: str, first: int = 0) -> str:
        parts = [sum(each[1] for each in one[name][first:]) for one in found]
        return f"{statistics.fmean(parts):.2f}"

    def wall(name: str, first: int = 0) -> str:
        return f"{max(sum(each[0] for each in one[name][first:]) for one in found):.1f}"

    per_step = len(found[0]["gather_with_flag"]) // STEPS
    tensor, pipeline = layout(ranks)
    return [
        str(ranks),
        f"{tensor} x {pipeline} x {ranks // tensor // pipeline}",
        *(cpu(name) for name in ("import", "initialize", "build_run")),
        *(cpu("gather_with_flag", per_step), wall("gather_with_flag", per_step)),
        *(cpu("run_step", 1), wall("run_step", 1)),
        *(cpu("save"), wall("save"), wall("finish")),
        *(cpu("all"), f"{sum(one['all'][0][1] for one in found):.0f}", wall("all")),
        f"{statistics.fmean(memory) / 2**20:.0f}",
        f"{sum(memory) / GIB:.1f}",
    ]


HEAD = [
    *("ranks", "tp x pp x dp", "import", "groups", "build"),
    *("exchange", "(wall)", "steps 2, 3", "(wall)", "3 saves", "(wall)", "(wait)"),
    *("a rank", "all ranks", "(wall)", "PSS MB", "GiB"),
]


def responses(folder: Path) -> list[Any]:
    """Return what was sampled in every step."""
    rows = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "run" / "transcripts").glob("step_*.jsonl"))
    ]
    assert len(rows) == STEPS
    return [[[each["text"] for each in group["rollouts"]] for group in step] for step in rows]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--fresh", action="store_true", help="start every process by itself")
    parser.add_argument("--spare-gib", type=float, default=3.0)
    options = parser.parse_args()
    spare, per_rank = options.spare_gib * GIB, 0.0
    rows, first = [], None
    for ranks in options.ranks:
        free = psutil.virtual_memory().available - spare
        if per_rank * ranks > free:
            print(f"{ranks} ranks need {per_rank * ranks / GIB:.1f} GiB, {free / GIB:.1f} are free")
            break
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            method = "spawn" if options.fresh else "forkserver"
            memory = run_layout(ranks, folder, method, spare)
            per_rank = max(memory)
            rows.append(row(ranks, folder, memory))
            sampled = responses(folder)
        print("  ".join(rows[-1]), flush=True)
        first = first or sampled
        if sampled != first:
            raise SystemExit(f"many_ranks: other responses with {ranks} ranks")
    print(text_table(HEAD, rows))


if __name__ == "__main__":
    main()

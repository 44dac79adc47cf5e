"""How long a run is away when a worker dies or the job is requeued.

    python benchmarks/restart_time.py [--rounds 3] [--ranks 2]

A small run on the bundled tiny models, text questions, a checkpoint after every step, under
`torchrun --max-restarts`. In every round: `start` is from the command to the first finished step,
`killed` from SIGKILL to one worker to the next finished step, `requeued` from SIGTERM to the exit
with code 75, and from starting the same command again to the next finished step. Of each, `ready`
is until the log says that the run was resumed. Wall-clock seconds of a busy machine say little;
the ratios to `start`, which imports and builds the same, say more.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from tests.support.running import CLONE, SMALL, environment, free_port
from zppo_mm.text_table import text_table

OPTIONS = (
    "modality=text",
    "parity.mode=none",
    "observability.report=false",
    "checkpoint.interval=1",
    "train.train_iters=1000",
)
POLL_SECONDS = 0.02
LIMIT_SECONDS = 900


def start(folder: Path, ranks: int) -> subprocess.Popen[bytes]:
    """Start the run, or go on with it."""
    words = ("--nproc-per-node", str(ranks), "--max-restarts=3", "--monitor-interval=0.1")
    ports = ("--master-port", str(free_port()), "--shutdown-timeout=300")
    tool = (str(CLONE / "tools/train_zppo.py"), f"output_dir={folder.parent}")
    with (folder.parent / "output.log").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *words, *ports),
                *(*tool, f"name={folder.name}", *SMALL, *OPTIONS),
            ],
            cwd=CLONE,
            env=environment(),
            stdout=log,
            stderr=log,
        )


def count(path: Path, text: str) -> int:
    """Return how often a file has a text."""
    return path.read_text(encoding="utf-8").count(text) if path.exists() else 0


def wait(path: Path, text: str, number: int, job: subprocess.Popen[bytes]) -> None:
    """Wait until a file has a text so often.

    Raises:
        SystemExit: It never came, or the job ended.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while count(path, text) < number:
        if time.monotonic() > deadline or job.poll() is not None:
            raise SystemExit(f"restart_time: no {text!r} in {path}, exit code {job.returncode}")
        time.sleep(POLL_SECONDS)


def wait_for_resumed(folder: Path, number: int, job: subprocess.Popen[bytes]) -> float:
    """Wait for the first step of a start that goes on; returns when it was ready."""
    wait(folder / "run.log", "resumed ", number, job)
    ready = time.monotonic()
    wait(folder / "metrics.jsonl", "\n", count(folder / "metrics.jsonl", "\n") + 1, job)
    return ready


def measure(folder: Path, ranks: int) -> dict[str, float]:
    """Return the seconds of one round by name."""
    found = {}
    began = time.monotonic()
    job = start(folder, ranks)
    wait(folder / "metrics.jsonl", "\n", 1, job)
    found["start"] = time.monotonic() - began
    wait(folder / "run.log", "checkpoint: saved", 1, job)

    began = time.monotonic()
    workers = [
        each
        for each in psutil.Process(job.pid).children()
        if "tools/train_zppo.py" in " ".join(each.cmdline())
    ]
    workers[-1].send_signal(signal.SIGKILL)
    found["killed, ready"] = wait_for_resumed(folder, 1, job) - began
    found["killed"] = time.monotonic() - began

    began = time.monotonic()
    job.send_signal(signal.SIGTERM)  # it passes it on
    job.wait(LIMIT_SECONDS)
    found["requeued, end"] = time.monotonic() - began
    began = time.monotonic()
    job = start(folder, ranks)
    found["requeued, ready"] = wait_for_resumed(folder, 2, job) - began
    found["requeued"] = time.monotonic() - began
    job.send_signal(signal.SIGTERM)
    job.wait(LIMIT_SECONDS)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            for key, value in measure(Path(name) / "run", options.ranks).items():
                seconds[key].append(value)
    rows = []
    for name, values in seconds.items():
        ratios = [value / first for value, first in zip(values, seconds["start"], strict=True)]
        rows.append([name, f"{statistics.median(values):.1f}", f"{statistics.median(ratios):.2f}"])
    print(text_table(["", "seconds", "of a start"], rows))


if __name__ == "__main__":
    main()

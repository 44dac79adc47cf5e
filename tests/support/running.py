"""Starts real runs as a user does and reads what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[2]
# A run of a few steps takes well under a minute on an idle core; a loaded machine gets a wide
# margin.
RUN_TIMEOUT_SECONDS = 280
PORTS = (20_000, 32_000)

SMALL = (
    "train.num_new_questions=8",
    "train.updates_per_step=2",
    "rollout.num_rollouts=4",
    "rollout.max_response_tokens=64",
    "teacher.num_rollouts=2",
    "evaluation.num_questions=6",
    "evaluation.interval=0",
    "observability.trackers=[]",
    "zone.rho_aug=0.5",
)
"""Options that make a step small but let it have replayed questions and reformulated prompts."""


def free_port() -> int:
    """Return a TCP port that is free now, from below those that the system hands out: a connection
    could take one of them meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment() -> dict[str, str]:
    """Return the environment of a program that imports this clone and uses one thread."""
    path = os.pathsep.join(filter(None, [str(CLONE), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def launcher(processes: int) -> list[str]:
    """Return the words that stand before a script to run it in several processes."""
    if processes == 1:
        return []
    count, port = ("--nproc-per-node", str(processes)), ("--master-port", str(free_port()))
    return ["-m", "torch.distributed.run", *count, *port]


def run_python(*words: str, cwd: Path = CLONE) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, whatever its exit code, and return what it said."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_SECONDS,
    )


def start(output_dir: Path, name: str, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    """Start a run of small steps; `output_dir/name` is its folder."""
    tool = [str(CLONE / "tools" / "train_zppo.py"), f"output_dir={output_dir}", f"name={name}"]
    return subprocess.Popen(
        [sys.executable, *launcher(processes), *tool, *SMALL, *options],
        cwd=CLONE,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(output_dir: Path, name: str, *options: str, processes: int = 1) -> Path:
    """Run to the end and return the run's folder."""
    process = start(output_dir, name, *options, processes=processes)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 0, output[-6000:]
    return output_dir / name


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def transcript(folder: Path, step: int) -> list[dict[str, Any]]:
    """Read the groups of one step."""
    return lines(folder / "transcripts" / f"step_{step:06d}.jsonl")


def buffer(folder: Path, step: int) -> dict[str, Any]:
    """Read what one step did to the buffer."""
    record: dict[str, Any] = json.loads(
        (folder / "buffer" / f"step_{step:06d}.json").read_text(encoding="utf-8")
    )
    return record


def judged_step(folder: Path) -> dict[str, Any]:
    """Return the metrics of a run of one step, whose judge is a tiny model: it graded everything,
    but knows no JSON, so that all is wrong.
    """
    (row,) = lines(folder / "metrics.jsonl")
    assert row["reward/judge_malformed"] == row["reward/judged"] > 0
    assert (
        row["rollout/ungraded"] == row["rollout/failed_groups"] == row["reward/judge_failures"] == 0
    )
    assert "data/skipped/needs_judge" not in row
    return row


def stopped_by_the_teacher(output_dir: Path, name: str, *options: str) -> str:
    """Run until the lost teacher ends the run, and return its output."""
    process = start(output_dir, name, *options)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 1, output[-3000:]
    assert "teacher: no answer to" in output
    return output

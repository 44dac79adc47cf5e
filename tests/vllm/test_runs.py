"""A run whose vLLM server is killed in the middle of a step; see `test_weight_sync`."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch

from tests.support.running import lines
from tests.support.vllm_students import start_run, student, vllm_command

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

RUN_SECONDS = 1500
WHOLE = ("--no-enable-prefix-caching", "--no-enable-chunked-prefill")
"""On a CPU a seeded request whose prompt is prefilled in pieces ends the server."""


def server_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes of a run's server, without its keeper."""
    below = psutil.Process(process.pid).children(recursive=True)
    [keeper] = [each for each in below if any("server_keeper" in word for word in each.cmdline())]
    return keeper.children(recursive=True)


def read_until(output: IO[str], text: str) -> str:
    """Read lines up to one with a text; returns them."""
    read = ""
    for line in output:
        read += line
        if text in line:
            return read
    raise AssertionError(f"{text!r} never came: {read[-3000:]}")


def test_a_killed_server_does_not_lose_the_run(tmp_path: Path) -> None:
    folder = student("qwen3_vl_tied", tmp_path / "student")
    process = start_run(
        tmp_path,
        folder,
        torch.float32,
        "rollout.servers=1",
        f"rollout.server_command={vllm_command(torch.float32, *WHOLE)}",
        "train.train_iters=2",
        "modality=image",
    )
    assert process.stdout is not None
    read = read_until(process.stdout, "weights of version 2")
    killed = server_of(process)
    assert len(killed) > 1, read[-3000:]
    for each in killed:
        each.kill()
    output, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, output[-6000:]
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert sum(row["weight_sync/restarts"] for row in rows) == 1
    # Nothing of either start outlives the run.
    assert not any(map(is_alive, killed))


def is_alive(process: psutil.Process) -> bool:
    """Return whether it runs; one that has ended may not have been asked for its exit code yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False

"""Runs of two steps on two ranks that a real vLLM server samples for; see `test_weight_sync`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import IO

import psutil
import pytest
import torch

from tests.support.running import lines, start
from tests.support.vllm_students import student, vllm_command

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

RUN_SECONDS = 800
WHOLE = ("--no-enable-prefix-caching", "--no-enable-chunked-prefill")
"""On a CPU a seeded request whose prompt is prefilled in pieces ends the server."""


def start_run(base: Path, name: str, dtype: torch.dtype, *options: str) -> subprocess.Popen[str]:
    """Start a run with a tiny student and a server of its own."""
    folder = student(name, base / "student", dtype)
    type_name = str(dtype).removeprefix("torch.")
    words = ["env", "VLLM_CPU_KVCACHE_SPACE=1", *vllm_command(), "--dtype", type_name, *WHOLE]
    return start(
        base,
        "run",
        f"model.student={folder}",
        f"model.params_dtype={type_name}",
        "rollout.engine=vllm",
        "rollout.servers=1",
        f"rollout.server_command={[*words]}",
        "train.train_iters=2",
        *options,
        processes=2,
    )


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


@pytest.mark.parametrize(
    ("name", "modality", "dtype"),
    [("qwen3_vl", "text", torch.float32), ("qwen3_5", "image", torch.bfloat16)],
)
def test_two_steps(name: str, modality: str, dtype: torch.dtype, tmp_path: Path) -> None:
    process = start_run(tmp_path, name, dtype, f"modality={modality}")
    output, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, output[-6000:]
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["weight_sync/bytes"] > 0
        assert row["weight_sync/failures"] == row.get("rollout/stale_groups", 0) == 0
        assert row["rollout/requests"] > 0


def test_a_killed_server_does_not_lose_the_run(tmp_path: Path) -> None:
    process = start_run(tmp_path, "qwen3_vl_tied", torch.float32, "modality=image")
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
    assert not any(each.is_running() for each in killed)

"""torchrun's elastic restart: a run goes on from its last checkpoint, with as many processes as
there are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.running import (
    CLONE,
    RUN_TIMEOUT_SECONDS,
    SMALL,
    buffer,
    environment,
    free_port,
    lines,
    run,
    transcript,
)

STEPS = 3
OPTIONS = (
    "modality=text",
    "parity.mode=none",
    "observability.report=false",
    "checkpoint.interval=1",
    # A lost node is noticed by its missing heartbeats.
    "parallel.timeout_minutes=0.3",
)

pytestmark = pytest.mark.timeout(3 * RUN_TIMEOUT_SECONDS)


def start_node(
    folder: Path, port: int, *options: str, processes: int = 1, is_host: bool = True
) -> subprocess.Popen[str]:
    """Start torchrun on one of at most two nodes."""
    rendezvous = (
        f"is_host={int(is_host)},last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    )
    launcher = (
        "--nnodes=1:2",
        f"--nproc-per-node={processes}",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=job",
        f"--rdzv-conf={rendezvous}",
        "--local-addr=127.0.0.1",
        "--monitor-interval=0.5",
        "--shutdown-timeout=5",
    )
    tool = (str(CLONE / "tools" / "train_zppo.py"), f"output_dir={folder.parent}")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *launcher),
            *(*tool, f"name={folder.name}", *SMALL, *OPTIONS, *options),
        ],
        cwd=CLONE,
        # What a node that joins later needs (docs/reliability.md).
        env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(processes == 1))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(folder: Path, step: int, node: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while not (folder / "transcripts" / f"step_{step:06d}.jsonl").exists():
        assert node.poll() is None, node.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "the step never came"
        time.sleep(0.02)


def workers(node: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text(encoding="utf-8")
    return [int(each) for each in children.split()]


def ended(node: subprocess.Popen[str]) -> str:
    output, _ = node.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert node.returncode == 0, output[-6000:]
    return output


def assert_same(left: Path, right: Path, num_steps: int) -> None:
    for step in range(1, num_steps + 1):
        ours, theirs = transcript(left, step), transcript(right, step)
        assert [group["uid"] for group in ours] == [group["uid"] for group in theirs]
        assert [[each["text"] for each in group["rollouts"]] for group in ours] == [
            [each["text"] for each in group["rollouts"]] for group in theirs
        ]
        assert buffer(left, step) == buffer(right, step)
    done = [row["step"] for row in lines(right / "metrics.jsonl")]
    assert done == list(range(1, len(done) + 1))


def test_a_killed_worker_is_started_again(tmp_path: Path) -> None:
    steps = f"train.train_iters={STEPS}"
    whole = run(tmp_path, "whole", *OPTIONS, steps)
    folder = tmp_path / "cut"
    node = start_node(folder, free_port(), steps, processes=2)
    wait_for_step(folder, 2, node)
    os.kill(workers(node)[1], signal.SIGKILL)
    output = ended(node)
    assert output.count(f"resumed {folder} after step") == 1
    assert_same(whole, folder, STEPS)


@pytest.mark.slow
def test_a_node_goes_and_another_comes(tmp_path: Path) -> None:
    # The second node must come before the steps are over.
    steps = "train.train_iters=40"
    folder, port = tmp_path / "cut", free_port()
    first = start_node(folder, port, steps)
    second = start_node(folder, port, steps, is_host=False)
    wait_for_step(folder, 2, first)
    (worker,) = workers(second)
    for process in (second.pid, worker):
        os.kill(process, signal.SIGKILL)
    second.communicate()
    before = len(list((folder / "transcripts").iterdir()))
    wait_for_step(folder, before + 3, first)  # by the first node alone
    third = start_node(folder, port, steps, is_host=False)
    ended(first)
    ended(third)
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "saved on 2 cpu ranks, the dropout streams are seeded again on 1 cpu ranks" in log
    assert "saved on 1 cpu ranks, the dropout streams are seeded again on 2 cpu ranks" in log
    assert_same(run(tmp_path, "whole", *OPTIONS, "train.train_iters=10"), folder, 10)

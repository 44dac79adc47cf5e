"""The job scripts of examples/slurm on a real Slurm with two virtual nodes (`make test-slurm`).

A job that is requeued, however often and for whatever reason, ends as one that was not.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.running import CLONE, SMALL, buffer, lines, run, run_python, transcript
from tests.support.slurm_cluster import NODES, TINY, SlurmCluster, slurm_cluster

STEPS = 10
TRAIN = "examples/slurm/train.sbatch"
OPTIONS = (
    *SMALL,
    "modality=text",
    f"train.train_iters={STEPS}",
    "parity.mode=none",
    "observability.report=false",
    "checkpoint.interval=2",
)
EVERYTHING = f"--export=ALL,PYTHON={sys.executable}"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two processes, without Slurm."""
    return run(tmp_path_factory.mktemp("whole"), "whole", *OPTIONS, processes=2)


def submit(cluster: SlurmCluster, folder: Path, *options: str, script: str = TRAIN) -> str:
    return cluster.submit(
        EVERYTHING, script, f"output_dir={folder}", "name=run", *OPTIONS, *options
    )


def assert_same(left: Path, right: Path) -> None:
    digests = [
        hashlib.sha256((folder / "hf" / "model.safetensors").read_bytes()).hexdigest()
        for folder in (left, right)
    ]
    assert digests[0] == digests[1]
    for step in range(1, STEPS + 1):
        assert transcript(left, step) == transcript(right, step)
        assert buffer(left, step) == buffer(right, step)
    assert lines(left / "evaluation.jsonl") == lines(right / "evaluation.jsonl")


def step_written(folder: Path, step: int) -> bool:
    return (folder / "run" / "transcripts" / f"step_{step:06d}.jsonl").exists()


def ranks(folder: Path) -> dict[str, psutil.Process]:
    """Return the processes of a run by rank."""
    return {
        each.info["environ"]["RANK"]: each
        for each in psutil.process_iter(["cmdline", "environ"])
        if f"output_dir={folder}" in (each.info["cmdline"] or [])
        and "RANK" in (each.info["environ"] or {})
        and "tools/train_zppo.py" in each.info["cmdline"]
    }


def test_a_job_that_is_requeued_five_times_ends_as_one_that_was_not(
    cluster: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path)
    node_down = ("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    for restart, step in enumerate((1, 3, 4, 6, 8), start=1):
        cluster.wait(lambda step=step: step_written(tmp_path, step), job)
        if restart in (1, 4):  # as before the time limit and on preemption
            cluster.command("scancel", "--signal=TERM", job)
        elif restart in (2, 5):
            ranks(tmp_path)["1"].send_signal(signal.SIGKILL)
        else:
            cluster.command(*node_down)
            cluster.wait(lambda restart=restart: cluster.num_restarts(job) == restart, job)
        cluster.wait_for_requeue(job, restart)
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert_same(whole, tmp_path / "run")
    log = cluster.log(job)
    assert log.count("job: the run asks to be continued") == 2
    assert log.count("job: a process failed with exit code 137") == 2
    assert log.count("resumed ") == 5, "one log of all starts"


def test_two_jobs_on_the_same_nodes(cluster: SlurmCluster, whole: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("left", "right")]
    jobs = [submit(cluster, folder) for folder in folders]
    for job, folder in zip(jobs, folders, strict=True):
        assert cluster.wait_for_end(job) == "COMPLETED"
        assert_same(whole, folder / "run")


def test_the_signal_before_the_time_limit_requeues(cluster: SlurmCluster, tmp_path: Path) -> None:
    # Slurm counts in minutes, and gives the signal up to a minute early.
    job = cluster.submit(
        f"{EVERYTHING},SIGNAL_SECONDS=45",
        "--time=2",
        "--signal=TERM@45",
        TRAIN,
        f"output_dir={tmp_path}",
        "name=run",
        *OPTIONS,
        "train.train_iters=1000",
    )
    cluster.wait(lambda: cluster.num_restarts(job) == 1, job)
    assert "the same command continues (SIGTERM)" in cluster.log(job)
    cluster.command("scancel", job)


def test_a_lead_that_uses_up_the_time_is_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.submit(EVERYTHING, "--time=5", TRAIN, f"output_dir={tmp_path}")
    assert cluster.wait_for_end(job) == "FAILED"
    assert "raise --time" in cluster.log(job)
    assert cluster.num_restarts(job) == 0


def test_an_error_of_the_user_is_not_repeated(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "model.student=/nowhere")
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.exit_code(job) == 1
    assert cluster.num_restarts(job) == 0
    assert "/nowhere" in cluster.log(job)


def test_a_cancelled_job_does_not_come_back(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path)
    cluster.wait(lambda: step_written(tmp_path, 1), job)
    cluster.command("scancel", job)
    cluster.wait(lambda: not ranks(tmp_path), job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    assert cluster.num_restarts(job) == 0


@pytest.mark.parametrize(
    ("script", "size"),
    [
        ("train_with_servers", (*TINY, "--nodes=2")),
        ("train_hetjob", (*TINY, "--nodes=1", ":", *TINY, "--nodes=1")),
    ],
)
def test_a_run_with_its_teacher_on_nodes_of_the_job(
    cluster: SlurmCluster, tmp_path: Path, script: str, size: tuple[str, ...]
) -> None:
    command = "exec $PYTHON -m tests.support.teacher_server $SERVER_PORT"
    job = cluster.submit(
        f"{EVERYTHING},SERVER_COMMAND={command}",
        f"examples/slurm/{script}.sbatch",
        f"output_dir={tmp_path}",
        "name=run",
        *OPTIONS,
        "train.train_iters=2",
        "teacher.model=tiny",
        size=size,
    )
    assert cluster.wait_for_end(job) == "COMPLETED"
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 2
    assert all(row["teacher/requests"] > 0 for row in metrics)


def test_an_array_makes_the_runs_of_a_comparison(cluster: SlurmCluster, tmp_path: Path) -> None:
    options = (option.split("=", 1) for option in (*OPTIONS, "train.train_iters=2"))
    plan = {
        "output_dir": str(tmp_path / "runs"),
        "methods": ["grpo", "zppo"],
        "seeds": [0],
        "options": {key: yaml.safe_load(value) for key, value in options},
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(plan))
    job = cluster.submit(
        EVERYTHING,
        "--array=0-1",
        "examples/slurm/compare.sbatch",
        str(path),
        size=(*TINY, "--nodes=1"),
    )
    for task in ("0", "1"):
        assert cluster.wait_for_end(f"{job}_{task}") == "COMPLETED"
    report = run_python("tools/compare.py", str(path), "--report-only")
    assert report.returncode == 0, report.stdout + report.stderr


def test_the_scripts_are_good_shell() -> None:
    for path in (CLONE / "examples" / "slurm").glob("*.s*"):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert os.path.exists(CLONE / TRAIN)

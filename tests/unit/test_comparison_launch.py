"""Runs as processes: none twice, killed ones again, a failure is reported and stops no other. The
program is a short script, not a training.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.simulated_comparison import STEPS, make_plan
from zppo_mm.comparison.launch import output_path, run_all
from zppo_mm.comparison.plan import Plan, load_plan
from zppo_mm.comparison.results import read_results

ROOT = Path(__file__).parents[2]

PROGRAM = f"""
import json, sys
from pathlib import Path
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(options["output_dir"]) / options["name"]
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
print("hello from", options["name"])
if options["name"] in Path(__file__).with_name("broken").read_text().split():
    sys.exit("no space left")
sys.path.insert(0, {str(ROOT)!r})
from zppo_mm.config.load import load_config, save_config
save_config(load_config(None, sys.argv[1:]), folder / "config.yaml")
for name, steps in (("metrics.jsonl", range(1, {STEPS + 1})), ("evaluation.jsonl", (0, {STEPS}))):
    (folder / name).write_text("".join(json.dumps({{"step": step,
    "accuracy": 0.5}}) + "\\n" for step in steps))
(folder / "hf").mkdir(exist_ok=True)
"""


def program(folder: Path, *broken: str) -> Path:
    (folder / "broken").write_text(" ".join(broken))
    path = folder / "train.py"
    path.write_text(PROGRAM)
    return path


def starts(plan: Plan) -> list[int]:
    return [
        len((run.folder / "starts").read_text()) if (run.folder / "starts").exists() else 0
        for run in plan.runs
    ]


@pytest.mark.medium
def test_a_finished_run_is_not_repeated_and_a_failed_one_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plan = make_plan(tmp_path, parallel_runs=2)
    (failure,) = run_all(plan, program(tmp_path, "zppo-seed0"))
    assert failure.run.name == "zppo-seed0"
    assert failure.reason.splitlines() == [
        "exit status 1 after step 0; the end of its output:",
        "hello from zppo-seed0",
        "no space left",
    ]
    assert starts(plan) == [1, 1, 1, 1]
    assert "zppo-seed0 failed, exit status 1 after step 0" in caplog.text
    assert "grpo_replay-seed1 finished after" in caplog.text
    assert "held-out accuracy 50.0%" in caplog.text
    assert run_all(plan, program(tmp_path)) == []
    assert starts(plan) == [1, 2, 1, 1]
    assert output_path(plan, plan.runs[0]).read_text() == "hello from grpo_replay-seed0\n"


@pytest.mark.parametrize("missing", ["hf", "metrics.jsonl", "evaluation.jsonl"])
@pytest.mark.medium
def test_a_run_that_lacks_its_end_is_started_again(tmp_path: Path, missing: str) -> None:
    plan = make_plan(tmp_path, seeds=[0])
    tool = program(tmp_path)
    run_all(plan, tool)
    path = plan.runs[1].folder / missing
    if path.is_dir():
        path.rmdir()
    else:
        path.write_text(path.read_text().splitlines(True)[0])
    assert run_all(plan, tool) == []
    assert starts(plan) == [1, 2]


def test_a_run_that_ends_well_but_early_failed(tmp_path: Path) -> None:
    plan = load_plan(
        make_plan(tmp_path, seeds=[0]).folder.parent / "compare.yaml",
        [f"train.train_iters={STEPS + 1}"],
    )
    failures = run_all(plan, program(tmp_path))
    assert [failure.reason.splitlines()[0] for failure in failures] == [
        f"exit status 0 after step {STEPS}; the end of its output:"
    ] * 2


def test_a_finished_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    plan, tool = make_plan(tmp_path, seeds=[0]), program(tmp_path)
    run_all(plan, tool)
    changed = make_plan(
        tmp_path, seeds=[0], methods={"grpo_replay": {"options": {"train.lr": 0.5}}, "zppo": None}
    )
    (failure,) = run_all(changed, tool)
    assert failure.run.label == "grpo_replay"
    assert (
        "a finished run of another configuration, got train.lr was 3e-05, is 0.5, expected the "
        "planned one" in failure.reason
    )
    refused, same = (read_results(changed).runs[label][0] for label in ("grpo_replay", "zppo"))
    assert (refused.status, refused.counts) == (
        "finished, with another configuration",
        False,
    )  # nor is it mixed into the tables
    assert not same.is_refused
    assert starts(plan) == [1, 1]


@pytest.mark.medium
def test_the_runs_end_with_the_comparison(tmp_path: Path) -> None:
    make_plan(tmp_path, seeds=[0])
    tool = tmp_path / "sleep.py"
    tool.write_text(
        "import os, sys, time\nopen(sys.argv[0] + '.pid', "
        "'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    code = (
        f"import sys, tools.compare as compare; compare.TRAIN_TOOL = {str(tool)!r}; "
        "sys.exit(compare.main())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "compare.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    pid_file, deadline = Path(f"{tool}.pid"), time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)

"""What reward functions cost beside a step of the text demo, in CPU time: runs some steps of the
demo, then grades the rollouts of the last one by rules and by functions.

python benchmarks/reward_functions.py
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from data.question import Question
from zppo_mm.rewards.verify import Verifier

STEPS, ROUNDS = 8, 5
FUNCTIONS = {
    "rules of math": "",
    "ready.texts:anls": "zppo_mm.rewards.ready.texts:anls",
    "examples/own_reward": "examples/own_reward/reward.py:box_reward",
    "ready.tags:right_and_tagged": "zppo_mm.rewards.ready.tags:right_and_tagged",
}


def seconds_of_demo(output_dir: str, num_steps: int) -> float:
    """Run the demo without its evaluations and checkpoints; returns its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = (
        "modality=text",
        f"output_dir={output_dir}",
        f"name=steps{num_steps}",
        f"train.train_iters={num_steps}",
        "evaluation.interval=0",
        "evaluation.num_questions=1",
        "observability.report=false",
    )
    command = [sys.executable, "tools/train_zppo.py", *options]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": "."})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those below it that live."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def grading_seconds(items: Sequence[tuple[Question, str]], function: str) -> tuple[float, float]:
    """Return CPU and wall-clock seconds of grading some responses, workers started before."""
    metadata = json.dumps({"box": [2, 3, 7, 5]})
    asked = items
    if function:
        asked = [(replace(question, metadata=metadata), text) for question, text in items]
    with Verifier(functions={"math": function} if function else {}, num_workers=1) as verifier:
        verifier.verify_all(asked)
        cpu, clock = cpu_seconds(), time.monotonic()
        for _ in range(ROUNDS):
            verifier.verify_all(asked)
        return (cpu_seconds() - cpu) / ROUNDS, (time.monotonic() - clock) / ROUNDS


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, several = (seconds_of_demo(folder, steps) for steps in (1, STEPS))
        step = (several - one) / (STEPS - 1)
        path = Path(folder, f"steps{STEPS}", "transcripts", f"step_{STEPS:06d}.jsonl")
        groups = [json.loads(line) for line in path.read_text().splitlines()]
        # All as mathematics: what is multiple choice is compared with its letter.
        items = [
            (Question(group["uid"], "", (), group["answer"], "math"), rollout["text"])
            for group in groups
            for rollout in group["rollouts"]
        ]
    print(f"a step: {step:.2f} s of CPU time, {len(items)} responses in the last one")
    for name, function in FUNCTIONS.items():
        cpu, clock = grading_seconds(items, function)
        times = f"{cpu * 1e3:.1f} ms of CPU time, {clock * 1e3:.1f} ms of the clock"
        print(f"{name}: {times}, {cpu / step:.2%} of a step")


if __name__ == "__main__":
    main()

"""One GRPO step of zppo_mm beside one of TRL's GRPOTrainer, on the CPU.

    python benchmarks/grpo_step.py [--trl-python PATH] [--threads 1 2] [--rounds 3] [--steps 4] \
        [--dtype bfloat16]

PATH is the Python of an environment of its own (TRL and this project need not agree on versions),
made for example by `python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
transformers==5.23.0 datasets`. Without it only zppo_mm is measured, with prompts shared in a
micro-batch (shared-prefix training) and repeated for every rollout.

A step is rollout, grading and one AdamW update. Both sides do equal work in it:
- The same weights, a random Qwen3.5 of about ten million parameters, read from the same Hugging
  Face folder. As transformers computes its DeltaNet layers slowly without CUDA kernels, both also
  train a plain Qwen3 (attention only) of as many parameters. Each row of TRL is compared with ours
  of the same weights.
- The same eight prompts in every step, the same tokenizer and chat template, eight rollouts each,
  temperature 1. Every response has 64 tokens: zppo_mm is given no stop token, TRL a smallest
  length. The tokens per step are counted on both sides and must agree.
- Rewards alternate 0 and 1 inside every group. zppo_mm leaves groups of equal rewards out of the
  update; here there are none, which is checked on both sides. zppo_mm really grades the responses
  besides.
- In bfloat16 both hold bfloat16 weights. zppo_mm's optimizer keeps float32 copies of them, TRL's
  does not: ours does that much more.
- One update per step over all 64 sequences, one forward and backward pass each: both take the
  log-probs of the rollout as the old ones. Neither recomputes activations. Each side cuts the
  update into micro-batches of the size that suits it best on a CPU.

Each side runs in a process of its own with the given number of threads, in turns, so that a busy
machine slows both alike. The first step of a process warms up and is not counted. Seconds are
medians over all counted steps; peak memory is that of the whole process.

`step_profile.py` says what our CPU seconds are spent on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAMILIES = {"qwen3_5": "Qwen3.5", "qwen3": "Qwen3 (attention only)"}
MEBIBYTE_KIB = 1024


@dataclass
class Side:
    """One way to run the steps, and what was measured."""

    name: str
    family: str
    command: list[str]
    steps: list[dict[str, float]] = field(default_factory=list)
    peak_mebibytes: list[float] = field(default_factory=list)

    def run(self, threads: int, result: Path) -> None:
        """Run one process and keep all its steps but the first."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(HERE.parent),
        }
        log = result.with_suffix(".log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [*self.command, str(result)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{self.name} failed:\n{log.read_text()[-4000:]}")
        self.steps += json.loads(result.read_text())[1:]
        self.peak_mebibytes.append(usage.ru_maxrss / MEBIBYTE_KIB)

    def median(self, key: str) -> float:
        """Return the median of a measurement over all steps."""
        return statistics.median(step[key] for step in self.steps)


def sides(folder: Path, arguments: argparse.Namespace) -> list[Side]:
    """Return the ways to make a step; ours with shared prompts is the first of its family."""
    result = []
    for family, network in FAMILIES.items():
        ours = [
            sys.executable,
            *(str(HERE / "grpo_step_ours.py"), str(folder), family, arguments.dtype),
            *(str(arguments.steps + 1), str(arguments.micro_batch_tokens)),
        ]
        result.append(Side(f"zppo_mm, {network}", family, [*ours, "always"]))
        result.append(Side("  prompts not shared", family, [*ours, "never"]))
        if arguments.trl_python is not None:
            theirs = [
                arguments.trl_python,
                *(str(HERE / "grpo_step_trl.py"), str(folder), family, arguments.dtype),
                *(str(arguments.steps + 1), str(arguments.trl_sequences)),
            ]
            result.append(Side("  TRL, the same weights", family, theirs))
    return result


def measure(folder: Path, threads: int, arguments: argparse.Namespace) -> list[Side]:
    """Run all sides in turns."""
    measured = sides(folder, arguments)
    for turn in range(arguments.rounds):
        for index, side in enumerate(measured):
            side.run(threads, folder / f"result-{threads}-{turn}-{index}.json")
    tokens = {step["tokens"] for side in measured for step in side.steps}
    assert len(tokens) == 1, f"the sides did not do equal work: {tokens} tokens per step"
    return measured


def show(threads: int, measured: list[Side]) -> None:
    """Print the table of one number of threads."""
    steps = measured[0].steps
    print(
        f"\n{threads} thread(s), {steps[0]['tokens']:.0f} tokens per step with prompts, "
        f"{len(steps)} steps each; ratios to ours of the same weights"
    )
    print(
        f"{'':30}{'s/step':>8}{'min':>8}{'max':>8}{'generating':>12}"
        f"{'CPU s/step':>12}{'peak MiB':>10}{'ratio':>8}{'CPU ratio':>11}"
    )
    for side in measured:
        ours = next(other for other in measured if other.family == side.family)
        seconds = [step["seconds"] for step in side.steps]
        ratio, cpu_ratio = (
            side.median(key) / ours.median(key) for key in ("seconds", "cpu_seconds")
        )
        times = (
            f"{side.median('seconds'):8.2f}{min(seconds):8.2f}{max(seconds):8.2f}"
            f"{side.median('generation'):12.2f}"
        )
        print(
            f"{side.name:30}{times}{side.median('cpu_seconds'):12.2f}{max(side.peak_mebibytes):10.0f}{ratio:8.2f}{cpu_ratio:11.2f}"
        )


def main() -> None:
    """Make the material, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", help="Python of an environment with TRL")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="threads per process (default 1 2)"
    )
    for name, default, meaning in (
        ("--rounds", 3, "processes per side"),
        ("--steps", 4, "counted steps per process"),
        ("--micro-batch-tokens", 2048, "of zppo_mm"),
        ("--trl-sequences", 16, "of one forward pass of TRL"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make = [sys.executable, str(HERE / "grpo_step_material.py"), str(folder)]
        subprocess.run(make, check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
        for threads in arguments.threads:
            show(threads, measure(folder, threads, arguments))


if __name__ == "__main__":
    main()

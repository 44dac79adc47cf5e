"""Step time that the planner predicts beside steps that really run, on a CPU with one thread.

    OMP_NUM_THREADS=1 python tools/plan_run.py --calibrate rates.yaml
    OMP_NUM_THREADS=1 python benchmarks/plan_step_time.py rates.yaml [--steps 3]

Three random Qwen3.5 networks train by GRPO, eight prompts of eight rollouts and one update a step,
with responses of 64 tokens; none has the size of a network that calibration uses. Seconds are CPU
times of the process, so that what else the machine does matters little; the fewest of all steps
but the first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from benchmarks.grpo_step_material import (
    build_tokenizer,
    network_settings,
    write_question_shards,
)
from benchmarks.grpo_step_ours import RESPONSE_TOKENS, build, check_work
from zppo_mm.parallel import groups as parallel
from zppo_mm.planning.layouts import Candidate, Placement
from zppo_mm.planning.machine import load_machine
from zppo_mm.planning.step_time import Simulator, StepSeconds
from zppo_mm.planning.workload import LengthAssumption, Workload
from zppo_mm.step import run_step

SIZES = ((256, 6), (320, 8), (512, 8))
"""Hidden size and layers."""
HEAD_DIM = 64
NUM_NEW_QUESTIONS = 8
MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Measured:
    """Seconds of a real step, and the mean tokens of its prompts."""

    total: float
    sampling: float
    prompt_tokens: float


def write_material(folder: Path, width: int, num_layers: int) -> None:
    """Write a random network with its tokenizer, and the questions."""
    tokenizer, heads = build_tokenizer(), width // HEAD_DIM
    settings = network_settings(tokenizer) | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
    }
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=num_layers, **settings))
    model.float().save_pretrained(folder / "qwen3_5")
    tokenizer.save_pretrained(folder / "qwen3_5")
    write_question_shards(folder / "shards")


def compare(folder: Path, rates: str, num_steps: int) -> tuple[Measured, StepSeconds]:
    """Return the fastest of some steps, and the planner's."""
    run, stages, engine = build(folder, MICRO_BATCH_TOKENS, "always")
    found, sampling = [], []
    generate = engine.generate

    def timed(*arguments: Any) -> object:
        started = time.process_time()
        try:
            return generate(*arguments)
        finally:
            sampling.append(time.process_time() - started)

    engine.generate = timed  # type: ignore[method-assign]
    for step in range(1, num_steps + 2):
        sampling.clear()
        cpu = time.process_time()
        record = run_step(stages, step)
        cpu = time.process_time() - cpu
        check_work(record)
        prompts = [len(group.prompt.token_ids) for group in record.groups]
        found.append(Measured(cpu, sum(sampling), sum(prompts) / len(prompts)))
    fastest = min(found[1:], key=lambda each: each.total)
    machine = load_machine(rates)
    workload = Workload(
        num_steps=2,
        prompt=LengthAssumption(median=fastest.prompt_tokens, sigma=0.0),
        response=LengthAssumption(median=RESPONSE_TOKENS, sigma=0.0),
        # Half of every group is right.
        pass_rate_spread=1e9,
        open_fraction=0.0,
        algebra_fraction=0.0,
    )
    architecture, config = run.policy.model.architecture, run.config
    simulator = Simulator.of(architecture, config, machine, workload)
    parameters = sum(parameter.numel() for parameter in run.policy.model.parameters())
    predicted = simulator.run(Candidate(config, Placement("none"), 1, 1), parameters)
    run.close()
    parallel.shutdown()
    # A step of the benchmark saves no checkpoint.
    return fastest, replace(predicted, save=0.0)


def main() -> None:
    """Print a line per size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rates", help="written by tools/plan_run.py --calibrate")
    parser.add_argument("--steps", type=int, default=3, help="steps of which the fastest counts")
    known = parser.parse_args()
    torch.set_num_threads(1)
    print("| width, layers | sampling | planned | the rest | planned | step | planned | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for width, layers in SIZES:
        with tempfile.TemporaryDirectory() as temporary:
            write_material(Path(temporary), width, layers)
            real, planned = compare(Path(temporary), known.rates, known.steps)
        rest = planned.total - planned.plain
        cells = (real.sampling, planned.plain, real.total - real.sampling, rest)
        cells = (*cells, real.total, planned.total)
        print(
            f"| {width}, {layers} | "
            + " | ".join(f"{cell:.2f} s" for cell in cells)
            + f" | {planned.total / real.total:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

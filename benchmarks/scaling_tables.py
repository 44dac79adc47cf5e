"""Print the tables of docs/scaling.md: what the planner predicts for the paper's recipes.

python benchmarks/scaling_tables.py [--gpus 64 128 256 512 1024]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig, RunConfig
from zppo_mm.models.families.architecture import parse_architecture
from zppo_mm.parallel import groups
from zppo_mm.planning.machine import load_machine
from zppo_mm.planning.plan import PlannedLayout, make_plan
from zppo_mm.planning.workload import LengthAssumption, Workload, load_workload

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "paper"
SIZES = ("0.8B", "2B", "4B", "9B")
EIGHT_GPUS = ("train.num_new_questions=48", "zone.buffer_capacity=1250")
TEACHER_GPUS = (2,)
"""Of every node."""
NUM_STEPS = 2
"""Simulated; the first, which has no replay, does not count."""
HOUR = 3600


def plan(size: str, num_gpus: int, workload: Workload, *options: str) -> list[PlannedLayout]:
    """Return the layouts of a recipe, the fastest first, and print nothing."""
    config = load_config(RECIPES / f"{size.lower()}.yaml", list(options))
    architecture = parse_architecture(PUBLISHED[f"Qwen3.5-{size}"][0])
    machine = load_machine("H100-80GB")
    return list(make_plan(architecture, config, num_gpus, machine, workload, TEACHER_GPUS).layouts)


def of_recipe(size: str, workload: Workload, *options: str) -> PlannedLayout:
    """Return the recipe's own layout on 64 GPUs."""
    own = load_config(RECIPES / f"{size.lower()}.yaml", list(options))

    def shape(config: RunConfig) -> tuple[ParallelConfig, int]:
        return config.parallel, config.train.micro_batch_tokens

    return next(
        each
        for each in plan(size, 64, workload, *options)
        if shape(each.candidate.config) == shape(own)
    )


def hours(planned: PlannedLayout) -> float:
    """Return the hours of the run's steps."""
    return planned.seconds.total * planned.candidate.config.train.train_iters / HOUR


def row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print("|", *(f"{cell} |" for cell in cells), flush=True)


def show_recipes(workload: Workload) -> None:
    """Print the hours of the recipes, and their seconds by phase."""
    long = LengthAssumption(median=7000, sigma=0.9)
    longer = replace(
        workload,
        response=long,
        teacher=replace(workload.teacher, lengths=replace(long, sigma=0.8)),
    )
    cases = {
        "GRPO": (workload, "method=grpo"),
        "ZPPO": (workload,),
        "ZPPO, 128 requests": (workload, "teacher.max_concurrency=128"),
        "ZPPO, median 7,000": (longer,),
        "inject": (workload, "method=inject"),
        "off_distill": (
            workload,
            "method=off_distill",
            "train.updates_per_step=1",
            "distill.top_k=20",
        ),
    }
    found = {}
    for name, (assumed, *options) in cases.items():
        planned = [of_recipe(size, assumed, *options) for size in SIZES]
        found[name] = planned
        row(name, *(f"{hours(each):.1f}" for each in planned))
    for size, each in zip(SIZES, found["ZPPO"], strict=True):
        seconds = each.seconds
        phases = (
            seconds.plain,
            seconds.teacher,
            seconds.reformulated,
            seconds.grading,
            seconds.update,
            seconds.evaluation,
        )
        rollout = each.candidate.config.rollout
        row(
            size,
            *(f"{phase:.0f}" for phase in phases),
            f"{seconds.total:.0f}",
            f"{rollout.max_batch_size} rollouts at once in {rollout.cache_memory_gib} GiB",
        )


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    numbers = parser.parse_args().gpus
    groups.initialize(ParallelConfig(), seed=0)
    workload = replace(load_workload(None), num_steps=NUM_STEPS)
    show_recipes(workload)
    for num_gpus in (8, *numbers):
        cells = []
        for size in SIZES:
            options = EIGHT_GPUS if num_gpus == 8 else ()
            best = plan(size, num_gpus, workload, *options)[0]
            layout = best.candidate.config.parallel
            name = f"tp {layout.tensor_model_parallel_size}"
            for short, count in (
                ("pp", layout.pipeline_model_parallel_size),
                ("cp", layout.context_parallel_size),
            ):
                name += f", {short} {count}" if count > 1 else ""
            cells.append(f"{hours(best):.1f} ({name})")
        row(f"{num_gpus:,}", *cells)
    groups.shutdown()


if __name__ == "__main__":
    main()

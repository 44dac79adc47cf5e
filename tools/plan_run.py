"""Plan a run: every layout on some GPUs with its memory and the time of a step, the fastest first,
from the student's config.json and rates of the machine; nothing is loaded.

`python tools/plan_run.py --config run.yaml --gpus 8 --gpu H100-80GB`
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from zppo_mm.config.help import add_options, parse_with_options
from zppo_mm.config.load import load_config
from zppo_mm.errors import ZppoError
from zppo_mm.observability.logs import quiet_libraries
from zppo_mm.piped_output import ends_with_its_reader


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument("--gpus", type=int, help="GPUs of the whole job, the teacher's among them")
    parser.add_argument(
        "--gpu", default="H100-80GB", help="H100-80GB, H200-141GB or a YAML file of rates"
    )
    parser.add_argument("--workload", type=Path, help="YAML file of assumed lengths and pass rates")
    parser.add_argument(
        "--teacher-gpus", type=int, nargs="+", help="GPUs of a node for the teacher (default 1 2 4)"
    )
    parser.add_argument("--shown", type=int, default=10, help="layouts of the tables")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measure the rates here and write them"
    )
    add_options(parser)
    known = parse_with_options(parser, arguments)
    if not known.calibrate and not (known.config and known.gpus):
        parser.error("--config and --gpus are needed, or --calibrate FILE")
    return known


def plan(known: argparse.Namespace) -> str:
    """Return the tables of a run; imports what needs torch."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # counting needs no GPU
    config = load_config(known.config, known.options)
    from zppo_mm.config.schema import ParallelConfig
    from zppo_mm.models.families.architecture import load_architecture
    from zppo_mm.parallel import groups
    from zppo_mm.planning.layouts import TEACHER_GPUS
    from zppo_mm.planning.machine import load_machine
    from zppo_mm.planning.plan import format_plan, make_plan
    from zppo_mm.planning.workload import load_workload

    machine, workload = load_machine(known.gpu), load_workload(known.workload)
    architecture = load_architecture(config.model.student)
    groups.initialize(ParallelConfig(), seed=0)
    gpus = known.teacher_gpus or TEACHER_GPUS
    try:
        made = make_plan(architecture, config, known.gpus, machine, workload, gpus)
    finally:
        groups.leave()
    return format_plan(made, config.train.train_iters, known.shown)


def calibrate(path: Path) -> str:
    """Measure this machine and return the rates that were written."""
    from zppo_mm.planning.calibration import calibrate, write_rates

    return write_rates(calibrate(), path)


def main() -> int:
    """Plan or measure."""
    known = parse(sys.argv[1:])
    quiet_libraries()
    try:
        text = calibrate(known.calibrate) if known.calibrate else plan(known)
    except ZppoError as error:
        print(f"plan_run: {error}", file=sys.stderr)
        return 1
    with ends_with_its_reader():
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

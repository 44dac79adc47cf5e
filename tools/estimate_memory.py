"""Estimate the GPU memory that the student of a run needs, from its config.json alone.

`python tools/estimate_memory.py --config run.yaml --student-ranks 48`
"""

from __future__ import annotations

import argparse
import os
import sys

from zppo_mm.config.help import add_options
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig, RunConfig
from zppo_mm.errors import ZppoError
from zppo_mm.observability.logs import quiet_libraries


def parse(arguments: list[str]) -> tuple[RunConfig, int]:
    """Read the command line: the run, and the number of the student's ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--student-ranks", type=int, required=True, help="the student's GPUs, without the teacher's"
    )
    add_options(parser)
    known = parser.parse_intermixed_args(arguments)
    return load_config(known.config, known.options), known.student_ranks


def estimate(config: RunConfig, num_student_ranks: int) -> str:
    """Return the table of a run; imports what needs torch."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # counting needs no GPU
    quiet_libraries()
    from zppo_mm.conversion.memory import estimate_memory, format_estimate
    from zppo_mm.models.families.architecture import load_architecture
    from zppo_mm.parallel import groups

    architecture = load_architecture(config.model.student)
    groups.initialize(ParallelConfig(), seed=0)
    table = format_estimate(estimate_memory(architecture, config, num_student_ranks))
    groups.shutdown()
    return table


def main() -> int:
    """Read the command line, count, print a table."""
    try:
        print(estimate(*parse(sys.argv[1:])))
    except ZppoError as error:
        print(f"estimate_memory: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

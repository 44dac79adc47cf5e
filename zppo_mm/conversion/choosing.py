"""Which checkpoint of a run is exported."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from zppo_mm.errors import CheckpointError
from zppo_mm.parallel import groups as parallel
from zppo_mm.report.run_record import read_lines
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint_files import folder_of_step, step_folders

Choice: TypeAlias = int | Literal["newest", "best"]
"""The steps of a checkpoint, or how it is found."""
logger = logging.getLogger(__name__)


def choose_checkpoint(run: RunFolder, choice: Choice) -> Path:
    """Return a complete checkpoint of a run.

    Args:
        run: The run.
        choice: `best`: the one with the highest held-out accuracy in `evaluation.jsonl`, the
            earliest of equals.

    Raises:
        CheckpointError: There is none, or none of that step, or none that was evaluated.
    """
    complete = {
        int(path.name.removeprefix("step_")): path for path in step_folders(run.checkpoints)
    }
    if not complete:
        raise CheckpointError(
            f"{run}: the run has no checkpoint, got no complete folder in {run.checkpoints.name}/, "
            "expected one; let it run until it has saved"
        )
    if choice == "newest":
        return complete[max(complete)]
    if choice == "best":
        return complete[_best_step(run, complete)]
    if choice not in complete:
        raise CheckpointError(
            f"{folder_of_step(run.checkpoints, choice)}: no such checkpoint, got step {choice}, "
            f"expected one of {_listed(complete)}; choose one of them, and raise checkpoint.keep "
            "to keep more"
        )
    return complete[choice]


def _best_step(run: RunFolder, complete: Mapping[int, Path]) -> int:
    accuracies = {
        int(row["step"]): float(row["accuracy"])
        for row in read_lines(run.evaluations)
        if row["accuracy"] is not None and math.isfinite(row["accuracy"])
    }
    evaluated = sorted(step for step in complete if step in accuracies)
    if not evaluated:
        raise CheckpointError(
            f"{run}: no checkpoint was evaluated, got checkpoints after {_listed(complete)} and "
            f"evaluations after {_listed(accuracies) or 'no step'}, expected a step with both; "
            "name one with --step, or make evaluation.interval a multiple of checkpoint.interval"
        )
    best = max(evaluated, key=lambda step: accuracies[step])
    first = max(accuracies, key=lambda step: accuracies[step])
    if parallel.rank() == 0:
        logger.info(
            "step %d has the best held-out accuracy, %.4f, of the checkpoints after %s",
            best,
            accuracies[best],
            _listed(evaluated),
        )
        if accuracies[first] > accuracies[best]:
            logger.warning(
                "step %d was better, %.4f, but has no checkpoint; %s",
                first,
                accuracies[first],
                "raise checkpoint.keep in later runs" if first else "it is the student itself",
            )
    return best


def _listed(steps: Mapping[int, object] | list[int]) -> str:
    return ", ".join(f"step {step}" for step in sorted(steps))

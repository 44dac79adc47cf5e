"""Resuming a run from its newest usable checkpoint, if the configuration still means the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zppo_mm.config.keys import may_change_on_resume
from zppo_mm.config.load import flat_keys
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import CheckpointError, ConfigError
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.parts import Run
from zppo_mm.run_folder import RunFolder
from zppo_mm.training import checkpoint
from zppo_mm.training.checkpoint_files import folder_of_step
from zppo_mm.weights.distributed_folder import on_every_rank

logger = logging.getLogger(__name__)


def resume(run: Run, folder: RunFolder) -> int | None:
    """Load the newest complete checkpoint; returns its step, or `None` if there is none and the
    run starts from the beginning.

    Raises:
        CheckpointError: There are checkpoints, but none of them can be used, or there were some.
        ConfigError: The folder has another run that is not to be continued.
    """
    config, checkpoints = run.config, folder.checkpoints
    if not config.checkpoint.resume:
        if parallel.on_rank_zero(lambda: checkpoint.latest(checkpoints) is not None):
            raise ConfigError(
                f"checkpoint.resume: {folder} holds checkpoints of an earlier run, got "
                "resume=false, expected a folder without; give another name or remove the folder"
            )
        _refuse_orphans(folder)
        return None
    state = checkpoint.load_latest(
        checkpoints, run.policy, lambda state: check_same_run(config, state["config"], folder)
    )
    if state is None:
        _refuse_orphans(folder)
        return None
    with checkpoint.translate_value_errors(checkpoints):
        run.stream.load_state_dict(state["stream"])
        run.stages.replay.load_state_dict(state["replay"])
        step = int(state["step"])
    if parallel.rank() == 0:
        warn_of_edited_functions(state.get("reward_functions", {}), run.verifier.functions.digests)
    _restore_overlap(run, state.get("ahead"), folder_of_step(checkpoints, step))
    logger.info("resumed %s after step %d", folder, step)
    return step


def warn_of_edited_functions(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn of reward functions whose files are not those of the checkpoint, by their digests."""
    for answer_type, digest in now.items():
        if saved.get(answer_type, digest) != digest:
            logger.warning(
                "reward.functions.%s: the file of the function was changed since the checkpoint; "
                "later steps have its new rewards",
                answer_type,
            )


def _restore_overlap(run: Run, ahead: dict[str, Any] | None, path: Path) -> None:
    """Take up the rollouts that a checkpoint keeps of the next step, if it has any and the run
    overlaps steps.
    """
    overlap = run.stages.overlap
    if overlap is not None and ahead is not None:

        def restore() -> None:
            with checkpoint.translate_value_errors(path):
                overlap.restore(ahead, path)

        on_every_rank(path, restore)


def _refuse_orphans(folder: RunFolder) -> None:
    """Refuse to start a run in a folder with the results of an earlier one, whose checkpoints are
    gone. Every rank calls this.

    Raises:
        CheckpointError: The folder has an exported model or broken checkpoints, but none to
            continue from.
    """
    broken = parallel.on_rank_zero(
        lambda: sorted(path.name for path in folder.checkpoints.glob("step_*"))
    )
    if parallel.on_rank_zero(folder.hf.exists):
        raise CheckpointError(
            f"{folder}: a finished run without checkpoints, got {folder.hf.name}/ but no "
            "checkpoint to continue from, expected both or neither; give another name, or remove "
            "the folder to start again"
        )
    if broken:
        raise CheckpointError(
            f"{folder}: a run without a usable checkpoint, got {', '.join(broken)}, expected one "
            "that is complete; restore one from a copy, give another name, or remove the folder to "
            "start again"
        )


def check_same_run(config: RunConfig, saved: dict[str, Any], folder: RunFolder) -> None:
    """Compare the configuration with the checkpoint's.

    Raises:
        CheckpointError: A key that would change what the earlier steps mean is different.
    """
    # A checkpoint that is older than a key was made with its default.
    before, now = flat_keys(saved), flat_keys(asdict(config))
    default = flat_keys(asdict(RunConfig()))
    changed = {
        key: (old, value)
        for key, value in now.items()
        if (old := before.get(key, default.get(key))) != value
    }
    fixed = {
        key: values for key, values in changed.items() if not may_change_on_resume(RunConfig, key)
    }
    if fixed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in fixed.items())
        raise CheckpointError(
            f"{folder}: the configuration is not the one of the checkpoint: {listed}; resume with "
            "the old values, or give the new run another name"
        )
    if parallel.rank() == 0:
        for key, (old, new) in changed.items():
            logger.warning("resumed with %s=%r, was %r", key, new, old)

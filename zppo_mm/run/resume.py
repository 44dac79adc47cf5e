"""Resuming a run from its newest usable checkpoint, if the configuration still means the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zppo_mm.config.changes import Changes, KeyChange, find_changes
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import CheckpointError, ConfigError
from zppo_mm.observability.sinks import append_line, truncate_after
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
                "resume=false, expected a folder without; give another name, or start with "
                "--restart, which moves them aside"
            )
        _refuse_orphans(folder)
        return None
    allowed: tuple[KeyChange, ...] = ()

    def check(state: dict[str, Any]) -> None:
        nonlocal allowed
        allowed = check_same_run(config, state["config"], folder)

    state = checkpoint.load_latest(checkpoints, run.policy, check)
    if state is None:
        _refuse_orphans(folder)
        return None
    with checkpoint.translate_value_errors(checkpoints):
        run.stream.load_state_dict(state["stream"])
        run.stages.replay.load_state_dict(state["replay"])
        step = int(state["step"])
    if parallel.rank() == 0:
        warn_of_edited_functions(state.get("reward_functions", {}), run.verifier.functions.digests)
    parallel.on_rank_zero(lambda: _record_changes(folder, step, allowed))
    logger.info("resumed %s after step %d", folder, step)
    ahead = state.get("ahead")
    if allowed and ahead is not None:
        logger.info("step %d: sampled again, with the new values of keys", step + 1)
        ahead = None
    _restore_overlap(run, ahead, folder_of_step(checkpoints, step))
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
            "checkpoint to continue from, expected both or neither; give another name, or "
            "start with --restart, which moves it aside"
        )
    if broken:
        raise CheckpointError(
            f"{folder}: a run without a usable checkpoint, got {', '.join(broken)}, expected one "
            "that is complete; restore one from a copy, give another name, or start with "
            "--restart, which moves it aside"
        )


def check_same_run(
    config: RunConfig, saved: Mapping[str, Any], folder: RunFolder
) -> tuple[KeyChange, ...]:
    """Compare the configuration with the checkpoint's; returns what consent was given for.

    Raises:
        CheckpointError: A key that would change what the steps mean is different, without consent
            or where none can be given.
    """
    changes = find_changes(saved, config)
    if different := (*changes.refused, *changes.lacking_consent):
        listed = "; ".join(map(str, different))
        raise CheckpointError(
            f"{folder}: the configuration is not the one of the checkpoint: {listed}; resume with "
            f"the old values, {_ways_on(changes, folder)}"
        )
    if parallel.rank() == 0:
        for each in (*changes.free, *changes.allowed):
            logger.warning("resumed with %s=%r, was %r", each.key, each.new, each.old)
    return changes.allowed


def _ways_on(changes: Changes, folder: RunFolder) -> str:
    """Say how a run gets the values that its checkpoint does not have."""
    names = ",".join(dict.fromkeys(each.to_allow for each in changes.lacking_consent))
    allow = "" if changes.refused else f"allow them with 'checkpoint.allow_changes=[{names}]', "
    start = f"or start a new run from the trained weights: another name, model.student={folder.hf}"
    if folder.hf.is_dir():
        return allow + start
    export = f"tools/convert_checkpoint.py export {folder} {folder.hf}"
    return f"{allow}{start} after `python {export}`"


def _record_changes(folder: RunFolder, step: int, allowed: Sequence[KeyChange]) -> None:
    """Write what the steps after `step` have other values of. What an earlier start wrote and no
    step kept goes.
    """
    truncate_after(folder.changes, step - 1)
    for each in allowed:
        append_line(
            folder.changes, {"step": step, "key": each.key, "old": each.old, "new": each.new}
        )

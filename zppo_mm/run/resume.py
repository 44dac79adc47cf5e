"""Where a run goes on: from its newest usable checkpoint, if the configuration still means the
same.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zppo_mm.config.load import flat_keys
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import CheckpointError, ConfigError
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.build import Run
from zppo_mm.training import checkpoint

logger = logging.getLogger(__name__)

HF_FOLDER = "hf"
# What may change between two parts of a run: where and how it computes, how long it goes on, what
# it writes and looks at.
FREE_ON_RESUME = (
    "output_dir",
    "name",
    "parallel.",
    "model.transformer_impl",
    "model.recompute",
    "train.train_iters",
    "train.max_hours",
    "train.stop_within_seconds",
    "train.micro_batch_tokens",
    "train.share_prompts",
    "rollout.max_batch_size",
    "teacher.endpoints",
    "teacher.num_ranks",
    "teacher.tensor_model_parallel_size",
    "teacher.pipeline_model_parallel_size",
    "teacher.api_key_env",
    "teacher.on_failure",
    "teacher.max_concurrency",
    "teacher.connect_timeout_seconds",
    "teacher.read_timeout_seconds",
    "teacher.request_timeout_seconds",
    "teacher.num_retries",
    "teacher.backoff_seconds",
    "teacher.max_wait_seconds",
    "reward.",
    "data.decode",
    "data.num_decode_workers",
    "data.max_bad_share",
    "data.strict",
    "checkpoint.",
    "evaluation.",
    "parity.",
    "observability.",
)
_FURTHER_TEACHER = re.compile(r"^fallback_teachers\.\d+\.")


def resume(run: Run, folder: Path) -> int | None:
    """Load the newest complete checkpoint; returns its step, `None` if there is none and the run
    starts.

    Raises:
        CheckpointError: There are checkpoints, but none of them can be used, or there were some.
        ConfigError: The folder has another run that is not to be continued.
    """
    config = run.stages.config
    checkpoints = folder / checkpoint.CHECKPOINTS_FOLDER
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
    with checkpoint.taking_up(checkpoints):
        run.stream.load_state_dict(state["stream"])
        run.stages.replay.load_state_dict(state["replay"])
        step = int(state["step"])
    logger.info("resumed %s after step %d", folder, step)
    return step


def _refuse_orphans(folder: Path) -> None:
    """What a run has learned and recorded is not to be replaced by a new beginning because its
    checkpoints are gone; every rank calls it.

    Raises:
        CheckpointError: The folder has an exported model or broken checkpoints, but none to
            continue from.
    """
    broken = parallel.on_rank_zero(
        lambda: sorted(
            path.name for path in (folder / checkpoint.CHECKPOINTS_FOLDER).glob("step_*")
        )
    )
    if parallel.on_rank_zero((folder / HF_FOLDER).exists):
        raise CheckpointError(
            f"{folder}: a finished run without checkpoints, got {HF_FOLDER}/ but no checkpoint to "
            "continue from, expected both or neither; give another name, or remove the folder to "
            "start again"
        )
    if broken:
        raise CheckpointError(
            f"{folder}: a run without a usable checkpoint, got {', '.join(broken)}, expected one "
            "that is complete; restore one from a copy, give another name, or remove the folder to "
            "start again"
        )


def check_same_run(config: RunConfig, saved: dict[str, Any], folder: Path) -> None:
    """Compare the configuration with the checkpoint's.

    Raises:
        CheckpointError: A key that would change what the earlier steps mean is different.
    """
    # A checkpoint that is older than a key was made with its default.
    before, now, default = (
        flat_keys(saved),
        flat_keys(asdict(config)),
        flat_keys(asdict(RunConfig())),
    )
    changed = {
        key: (old, value)
        for key, value in now.items()
        if (old := before.get(key, default.get(key))) != value
    }
    fixed = {
        key: values
        for key, values in changed.items()
        if not _FURTHER_TEACHER.sub("teacher.", key).startswith(FREE_ON_RESUME)
    }
    if fixed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in fixed.items())
        raise CheckpointError(
            f"{folder}: the configuration is not the one of the checkpoint: {listed}; resume with "
            "the old values, or give the new run another name"
        )
    for key, (old, new) in changed.items():
        if parallel.rank() == 0:
            logger.warning("resumed with %s=%r, was %r", key, new, old)

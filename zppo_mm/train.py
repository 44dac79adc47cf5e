"""The run: open it, train step by step, export."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import GradingError, RolloutServersLostError, ZppoError
from zppo_mm.interruption import Interruption, StopRequested
from zppo_mm.mirror.upload import Mirror
from zppo_mm.observability.logs import configure_logging
from zppo_mm.observability.sinks import MetricsLog
from zppo_mm.parallel import failures
from zppo_mm.parallel.partition import divide_job
from zppo_mm.parity.compare import ParityError
from zppo_mm.parity.gate import check_parity, is_parity_due
from zppo_mm.run.checkpoints import RunCheckpoints
from zppo_mm.run.mirroring import mirrored, refuse_stored_run
from zppo_mm.run.model_paths import check_model_paths
from zppo_mm.run.parts import Run
from zppo_mm.run.prepare import prepare_folder
from zppo_mm.run.records import (
    evaluate,
    evaluate_first,
    export_student,
    is_evaluation_due,
    metrics_log,
    record_step,
    refresh_report,
)
from zppo_mm.run.remote import fetched_models
from zppo_mm.run.resume import resume
from zppo_mm.run.session import open_run
from zppo_mm.run.teacher_job import link_to_teacher, serve_teacher
from zppo_mm.run_folder import RunFolder
from zppo_mm.stages.record import StepRecord
from zppo_mm.step import run_step


def folder_of(config: RunConfig) -> RunFolder:
    """Return the folder that the run writes to."""
    return RunFolder(
        Path(config.output_dir) / (config.name or f"{config.method}-{config.modality}")
    )


def train(
    config: RunConfig, interruption: Interruption | None = None, restart: bool = False
) -> RunFolder:
    """Train from the start or from the newest checkpoint to the last step, then export.

    Every rank calls this; those of a teacher on ranks of its own answer until the others have
    ended.

    Args:
        config: The run.
        interruption: Ends it before its last step; `None` is nothing that could.
        restart: Whether an earlier run in the folder is moved aside, and not continued.

    Returns:
        The run's folder.

    Raises:
        RunStopped: On every rank, if it was ended before its last step.
    """
    interruption = interruption or Interruption()
    failures.refuse_restarts(config.train.max_hours)
    interruption.limit(config.train.stop_within_seconds, config.train.max_hours)
    configure_logging(None, int(os.environ.get("RANK", "0")))
    with fetched_models(config) as config:
        return _train(config, interruption, restart)


def _train(config: RunConfig, interruption: Interruption, restart: bool) -> RunFolder:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # Once per machine: the others wait for this process to join them, and are ended by their
        # launcher if it does not.
        check_model_paths(config.model, [config.teacher, *config.fallback_teachers])
    folder = folder_of(config)
    if os.environ.get("RANK", "0") == "0":
        refuse_stored_run(config.checkpoint, folder, restart)
    partition = divide_job(config.parallel, config.teacher)
    if partition is not None and partition.name == "teacher":
        serve_teacher(config, folder, partition, interruption)
        return folder
    with (
        link_to_teacher(config.parallel, partition) as link,
        open_run(config, folder, partition, link, interruption, restart) as run,
        mirrored(config.checkpoint, folder) as mirror,
    ):
        train_steps(run, folder, mirror)
        export_student(run, folder)
    return folder


def train_steps(run: Run, folder: RunFolder, mirror: Mirror | None = None) -> None:
    """Resume, check parity, and run the steps that are left; every rank calls this.

    Args:
        run: The run.
        folder: Its folder.
        mirror: On rank 0, what keeps a copy of it.

    Raises:
        RunStopped: On every rank, with a checkpoint of the last complete step.
        TeacherLostError: The same, if the teacher does not answer.
        GradingError: The same, if grading fails too often.
        RolloutServersLostError: The same, if no server samples any more.
    """
    train_iters, interruption = run.config.train.train_iters, run.stages.interruption
    interruption.steps_done = resumed = resume(run, folder)
    done = resumed or 0
    prepare_folder(run.config, folder, resumed)
    checkpoints = RunCheckpoints(run, folder.checkpoints, mirror)
    if done < train_iters:
        check_parity(run, folder, done)
    with metrics_log(run, folder, done) as log:
        evaluate_first(run, folder, resumed)
        with interruption.protected():
            for step in range(done + 1, train_iters + 1):
                checkpoints.stop_if_requested(step - 1)
                started = time.perf_counter()
                with checkpoints.restoring_stream(step):
                    run.check_teacher()
                    with run.profiler.step(step):
                        record = run_step(run.stages, step)
                finish_step(run, folder, record, started, checkpoints, log)
            checkpoints.stop_if_requested(train_iters)


def finish_step(
    run: Run,
    folder: RunFolder,
    record: StepRecord,
    started: float,
    checkpoints: RunCheckpoints,
    log: MetricsLog | None,
) -> None:
    """Evaluate, record, check parity, save and report as they come due after a step.

    Raises:
        ParityError: On every rank, with a checkpoint, if sampling and training disagree.
        TeacherLostError: On every rank, with a checkpoint, if the step is the last that the teacher
            answered in.
        GradingError: The same, if grading fails too often in the evaluation.
        RolloutServersLostError: The same, if no server samples any more in the evaluation.
    """
    config, step = run.config, record.step
    train_iters = config.train.train_iters
    end: ZppoError | None = record.teacher_lost
    if is_evaluation_due(config.evaluation, train_iters, step) and end is None:
        # The step is complete; an evaluation that is dropped is made up for when the run goes on.
        with record.metrics.phase("evaluation"), suppress(StopRequested):
            try:
                evaluate(run, folder, step)
            except (GradingError, RolloutServersLostError) as error:
                end = error
    run.release_memory()
    record.metrics.merge(checkpoints.take_metrics())
    record_step(run, folder, record, time.perf_counter() - started, log)
    if is_parity_due(config.parity, train_iters, step) and end is None:
        with suppress(StopRequested):
            try:
                check_parity(run, folder, step)
            except (ParityError, RolloutServersLostError) as error:
                end = error
    is_last = step == train_iters or end is not None
    is_due = step == train_iters or step % config.checkpoint.interval == 0
    checkpoints.poll()
    if is_due or is_last:
        checkpoints.save(step, wait=is_last)
    if is_due:
        refresh_report(run, folder)
    if end is not None:
        raise end

"""The run: build, resume, loop, save, export."""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from data.errors import DataError
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ZppoError
from zppo_mm.interruption import EXIT_CODE, Interruption, RunStopped, StopRequested
from zppo_mm.lora.adapters import adapters_of
from zppo_mm.lora.export import export_adapter
from zppo_mm.observability.learning_warnings import LearningWatch, warn_of_few_questions
from zppo_mm.observability.logs import configure_logging
from zppo_mm.observability.metrics import Mean, Sum, process_memory
from zppo_mm.observability.sinks import (
    EVALUATION_FILE,
    MetricsLog,
    append_evaluation,
    open_metrics_log,
)
from zppo_mm.observability.transcripts import write_buffer, write_held_out_answers, write_transcript
from zppo_mm.parallel import failures
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.liveness_barrier import open_liveness_barrier
from zppo_mm.parallel.partition import JobPartition, PartitionLink, divide_job
from zppo_mm.parity.gate import check_parity
from zppo_mm.report.page import write_report
from zppo_mm.report.run_record import read_lines
from zppo_mm.rollout.held_out import ask_held_out, summarise
from zppo_mm.run.build import Run, build_run, student_folder
from zppo_mm.run.folder import CONFIG_FILE as CONFIG_FILE
from zppo_mm.run.folder import claimed, prepare_folder
from zppo_mm.run.model_paths import check_model_paths
from zppo_mm.run.resume import HF_FOLDER as HF_FOLDER
from zppo_mm.run.resume import resume
from zppo_mm.run.teacher_job import link_to_teacher, serve_teacher
from zppo_mm.step import StepRecord, run_step
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.training import checkpoint
from zppo_mm.weights.hf_export import export_hf_weights

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
# Writing to an open file names no file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def run_folder(config: RunConfig) -> Path:
    """Return the folder that the run writes to."""
    return Path(config.output_dir) / (config.name or f"{config.method}-{config.modality}")


def train(config: RunConfig, interruption: Interruption | None = None) -> Path:
    """Train from the start or from the newest checkpoint to the last step, then export.

    Every rank calls this; those of a teacher on ranks of its own answer until the others have
    ended. The folder of a run holds config.yaml, metrics.jsonl, evaluation.jsonl, evaluations/,
    parity.jsonl, transcripts/, buffer/, checkpoints/, hf/, adapter/ (with LoRA) and report.html.

    Args:
        config: The run.
        interruption: Ends it before its last step; `None` is nothing that could.

    Returns:
        The run's folder.

    Raises:
        RunStopped: On every rank, if it was ended before its last step.
    """
    interruption = interruption or Interruption()
    interruption.limit(config.train.stop_within_seconds, config.train.max_hours)
    configure_logging(None, int(os.environ.get("RANK", "0")))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # Once per machine: the others wait for this process to join them, and are ended by their
        # launcher if it does not.
        check_model_paths(config)
    folder = run_folder(config)
    partition = divide_job(config.parallel, config.teacher)
    if partition is not None and partition.name == "teacher":
        serve_teacher(config, partition, interruption)
    else:
        with link_to_teacher(config.parallel, partition) as link:
            _train_student(config, folder, partition, link, interruption)
    return folder


def _train_student(
    config: RunConfig,
    folder: Path,
    partition: JobPartition | None,
    link: PartitionLink | None,
    interruption: Interruption,
) -> None:
    parallel.initialize(config.parallel, config.seed, partition)
    failures.end_with_launcher()
    stopped: RunStopped | None = None
    with (
        failures.translate_collective_errors(),
        open_liveness_barrier(config.parallel, partition, interruption) as barrier,
        claimed(folder),
    ):
        run = build_run(config, link, barrier, interruption)
        try:
            _run_to_the_end(run, folder)
        except RunStopped as error:
            stopped = error
        finally:
            run.close()
    # Nobody ends before all are done: a launcher ends the others as soon as one has.
    parallel.shutdown()
    if stopped is not None:
        raise stopped


def _run_to_the_end(run: Run, folder: Path) -> None:
    config = run.stages.config
    run.stages.interruption.steps_done = done = resume(run, folder)
    prepare_folder(config, folder, done)
    if (done or 0) < config.train.train_iters:
        check_parity(run, folder, done or 0)
    saver = checkpoint.CheckpointWriter(
        folder / checkpoint.CHECKPOINTS_FOLDER,
        config.checkpoint.keep,
        partial(setattr, run.stages.interruption, "steps_done"),
    )
    log = None
    if parallel.rank() == 0:
        warn_of_few_questions(config, run.stream.num_samples)
        log = MetricsLog(
            (
                open_metrics_log(config.observability, folder, config.train.train_iters, done or 0),
                LearningWatch(config),
            )
        )
    try:
        _loop(run, folder, done, log, saver)
        _finish(run, folder)
    finally:
        if log is not None:
            log.close()


def _loop(
    run: Run,
    folder: Path,
    done: int | None,
    log: MetricsLog | None,
    saver: checkpoint.CheckpointWriter,
) -> None:
    """Run the steps that are left, evaluating and saving as they come due.

    Raises:
        RunStopped: On every rank, with a checkpoint of the last complete step.
    """
    config = run.stages.config
    if done is None:
        _evaluate(run, folder, 0)
    elif _is_evaluated(config, done) and not parallel.on_rank_zero(
        partial(_has_evaluation, folder, done)
    ):
        # The run ended before that evaluation did; a lost teacher may be the judge of answers too.
        _evaluate(run, folder, done)
    with run.stages.interruption.protected():
        for step in range((done or 0) + 1, config.train.train_iters + 1):
            _heed_stop(run, step - 1, saver)
            _train_step(run, folder, step, log, saver)
        _heed_stop(run, config.train.train_iters, saver)


def _train_step(
    run: Run, folder: Path, step: int, log: MetricsLog | None, saver: checkpoint.CheckpointWriter
) -> None:
    """Run one step, with what comes due after it."""
    config = run.stages.config
    started = time.perf_counter()
    record = _run_or_drop(run, step, saver)
    if _is_evaluated(config, step) and not record.teacher_lost:
        # The step is complete; an evaluation that is dropped is made up for when the run goes on.
        with record.metrics.phase("evaluation"), suppress(StopRequested):
            _evaluate(run, folder, step)
    run.release_memory()
    _record(run, folder, record, time.perf_counter() - started, log)
    is_last = step == config.train.train_iters
    is_due = is_last or step % config.checkpoint.interval == 0
    saver.notice()
    if is_due or record.teacher_lost:
        _save(run, step, saver)
    if is_last or record.teacher_lost:
        saver.finish()
    if is_due and not parallel.any_rank(run.stages.interruption.is_requested):
        parallel.on_rank_zero(partial(_report, run, folder))
    if record.teacher_lost:
        raise record.teacher_lost


def _run_or_drop(run: Run, step: int, saver: checkpoint.CheckpointWriter) -> StepRecord:
    """Run a step; one that is dropped has moved nothing but the stream: put back, it is taken up
    again by a resumed run.

    Raises:
        TeacherLostError: On every rank, if the teacher does not answer.
        RunStopped: On every rank, if the run is to end.
    """
    place = run.stream.state_dict()
    try:
        if run.teachers.ranks is not None:
            run.teachers.ranks.check()
        return run_step(run.stages, step)
    except TeacherLostError:
        run.stream.load_state_dict(place)
        _save_once(run, step - 1, saver)
        raise
    except StopRequested:
        run.stream.load_state_dict(place)
    _heed_stop(run, step - 1, saver)
    raise AssertionError("a step is dropped because the run is to end")


def _heed_stop(run: Run, step: int, saver: checkpoint.CheckpointWriter) -> None:
    """End the run after a complete step.

    Raises:
        RunStopped: On every rank, with a checkpoint, if any of them is to end.
    """
    reasons = [
        reason for reason in parallel.gather_from_ranks(run.stages.interruption.reason) if reason
    ]
    if reasons:
        _save_once(run, step, saver)
        run.stages.interruption.close()
        raise RunStopped(step, reasons[0])


def _is_evaluated(config: RunConfig, step: int) -> bool:
    return step == config.train.train_iters or bool(
        config.evaluation.interval and step % config.evaluation.interval == 0
    )


def _has_evaluation(folder: Path, step: int) -> bool:
    return any(row["step"] == step for row in read_lines(folder / EVALUATION_FILE))


def _save(run: Run, step: int, saver: checkpoint.CheckpointWriter) -> None:
    state = {
        "step": step,
        "config": asdict(run.stages.config),
        "stream": run.stream.state_dict(),
        "replay": run.stages.replay.state_dict(),
    }
    saver.save(step, run.policy, state)


def _save_once(run: Run, step: int, saver: checkpoint.CheckpointWriter) -> None:
    """Leave a complete checkpoint of a step; one that is complete or under way is not to be at
    stake again.
    """
    saver.finish()
    if run.stages.interruption.steps_done != step:
        _save(run, step, saver)
        saver.finish()


def _evaluate(run: Run, folder: Path, step: int) -> None:
    config = run.stages.config
    if not run.held_out:
        return
    groups = ask_held_out(
        run.stages.sampler,
        run.held_out,
        run.templates.plain_text,
        run.evaluation_sampling,
        config.evaluation.num_rollouts,
        step,
    )
    result = summarise(groups, run.held_out, step)
    if parallel.rank() == 0:
        write_held_out_answers(folder, step, groups)
        append_evaluation(folder, result)
        parts = ", ".join(
            f"{source} {accuracy:.3f}" for source, accuracy in result.accuracy_by_source.items()
        )
        logger.info("held-out accuracy after step %d: %.3f (%s)", step, result.accuracy, parts)


def _record(
    run: Run, folder: Path, record: StepRecord, seconds: float, log: MetricsLog | None
) -> None:
    """Write transcripts, buffer file and metrics of a step."""
    metrics = record.metrics
    for memory in parallel.gather_from_ranks(process_memory()):
        metrics.merge(memory)
    for replica in parallel.gather_from_replicas([run.take_losses()]):
        for losses in replica:
            metrics.merge(losses)
    health = run.stream.health
    metrics.add("data/samples", Sum(health.num_good + health.num_bad))
    for reason, count in health.counts.items():
        metrics.add(f"data/skipped/{reason}", Sum(count))
    metrics.add("seconds/step", Sum(seconds))
    metrics.add(
        "throughput/tokens_per_second", Mean(metrics.values().get("rollout/tokens", 0.0), seconds)
    )
    if log is None:
        return
    advantages = {uid: values.tolist() for uid, values in record.advantages.items()}
    write_transcript(
        folder, record.step, record.groups, advantages, record.minibatches, record.teacher_rewards
    )
    write_buffer(folder, record.step, record.buffer_change)
    log.write(record.step, metrics.values())


def _finish(run: Run, folder: Path) -> None:
    """Export the trained student as a Hugging Face folder, its adapters merged, and the adapters by
    themselves beside it.
    """
    model, source = run.policy.model, student_folder(run.stages.config)
    export_hf_weights(model, source, folder / HF_FOLDER)
    # With more trained than adapters, these alone would be another model.
    if adapters_of(model) is not None and not run.stages.config.lora.also_train:
        export_adapter(model, source, folder / ADAPTER_FOLDER)
    if parallel.rank() == 0:
        logger.info("trained model in %s, report in %s", folder / HF_FOLDER, folder / "report.html")


def _report(run: Run, folder: Path) -> None:
    observability = run.stages.config.observability
    if parallel.rank() == 0 and observability.report:
        try:
            write_report(
                folder, lambda ref: run.media.open(ref).pixels, observability.report_examples
            )
        except Exception:
            # A page about the run must not end it; tools/make_report.py draws it again.
            logger.exception("the report could not be written, the run goes on")


def run_training(config: RunConfig, interruption: Interruption | None = None) -> int:
    """Train, and say in one line how the run ended if not at its end.

    Returns:
        The exit code: 0 at its end, 1 after an error that the user can mend, `EXIT_CODE` where the
        same command goes on.
    """
    try:
        train(config, interruption)
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            logger.info("%s", stopped)
        return EXIT_CODE
    except (ZppoError, DataError) as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_ERRORS:
            raise
        logger.error(
            "%s: a file of the run cannot be used, got %s, expected room and permission; check the "
            "disk, then the same command continues",
            run_folder(config),
            error,
        )
        return 1
    return 0

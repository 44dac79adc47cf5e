"""What a run writes beside its checkpoints: evaluations, step records, the report, the exported
student.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from data.health import TOO_LONG
from zppo_mm.config.schema import EvaluationConfig
from zppo_mm.lora.adapters import adapters_of
from zppo_mm.lora.export import export_adapter
from zppo_mm.observability.console_samples import log_samples
from zppo_mm.observability.learning_warnings import LearningWatch, warn_of_few_questions
from zppo_mm.observability.metrics import Max, Mean, Sum
from zppo_mm.observability.process_memory import process_memory
from zppo_mm.observability.rank_times import PhaseMetrics, RankTimes
from zppo_mm.observability.samples import make_samples
from zppo_mm.observability.sinks import (
    MetricsLog,
    append_evaluation,
    append_line,
    open_metrics_log,
)
from zppo_mm.observability.transcripts import write_buffer, write_held_out_answers, write_transcript
from zppo_mm.parallel import groups as parallel
from zppo_mm.report.run_record import read_lines
from zppo_mm.rollout.held_out import ask_held_out, summarise
from zppo_mm.rollout.processor import changed_processor_files, processor_overrides
from zppo_mm.run.build import student_folder
from zppo_mm.run.parts import Run
from zppo_mm.run_folder import RunFolder
from zppo_mm.stages.record import StepRecord
from zppo_mm.weights.hf_export import export_hf_weights

logger = logging.getLogger(__name__)


@contextmanager
def metrics_log(run: Run, folder: RunFolder, done: int) -> Iterator[MetricsLog | None]:
    """Hold the sinks of the run's metrics on rank 0; `None` on the others.

    Args:
        run: The run.
        folder: Its folder.
        done: Steps of the checkpoint that goes on, 0 without one.
    """
    if parallel.rank() != 0:
        yield None
        return
    config = run.config
    warn_of_few_questions(config.train.num_new_questions, run.stream.num_samples)
    watch = LearningWatch(config.rollout, config.distill)
    log = open_metrics_log(
        config.observability,
        folder,
        config.train.train_iters,
        done,
        others=(watch,),
        append=run.records.append,
    )
    try:
        yield log
    finally:
        log.close()


def is_evaluation_due(config: EvaluationConfig, train_iters: int, step: int) -> bool:
    """Return whether an evaluation follows a step; one always follows the last."""
    return step == train_iters or bool(config.interval and step % config.interval == 0)


def evaluate_first(run: Run, folder: RunFolder, done: int | None) -> None:
    """Evaluate before the first step of this part of the run, if that is missing.

    Args:
        run: The run.
        folder: Its folder.
        done: Steps of the checkpoint that goes on; `None` without one.
    """
    config = run.config
    if done is None:
        evaluate(run, folder, 0)
    elif is_evaluation_due(
        config.evaluation, config.train.train_iters, done
    ) and not parallel.on_rank_zero(
        lambda: any(row["step"] == done for row in read_lines(folder.evaluations))
    ):
        # The run ended before that evaluation did; a lost teacher may be the judge of answers too.
        evaluate(run, folder, done)


def evaluate(run: Run, folder: RunFolder, step: int) -> None:
    """Evaluate on the held-out questions after a step, if there are any; every rank calls this.

    Raises:
        GradingError: On every rank, if grading fails too often.
        RolloutServersLostError: On every rank, if no server samples any more.
    """
    if not run.held_out:
        return
    # Of the step that would sample next.
    run.stages.update_weights(step + 1)
    groups = ask_held_out(
        run.evaluation_sampler,
        run.held_out,
        run.templates.plain_text,
        run.evaluation_sampling,
        run.config.evaluation.num_rollouts,
        step,
    )
    run.stages.check_grading()
    result = summarise(groups, run.held_out, step, run.config.data.max_prompt_tokens)
    if parallel.rank() == 0:
        write_held_out_answers(folder, step, groups, run.records.replace)
        append_evaluation(folder, result, run.records.append)
        parts = ", ".join(
            f"{source or 'without source'} {accuracy:.3f}"
            for source, accuracy in result.accuracy_by_source.items()
        )
        logger.info("held-out accuracy after step %d: %.3f (%s)", step, result.accuracy, parts)


def record_step(
    run: Run, folder: RunFolder, record: StepRecord, seconds: float, log: MetricsLog | None
) -> None:
    """Write transcript, buffer file and metrics of a step; every rank calls this."""
    metrics = record.metrics
    times = _add_run_metrics(run, metrics)
    metrics.add("seconds/step", Sum(seconds))
    metrics.add(
        "throughput/tokens_per_second", Mean(metrics.values().get("rollout/tokens", 0.0), seconds)
    )
    if log is None:
        return
    advantages = {uid: values.tolist() for uid, values in record.advantages.items()}
    write_transcript(
        folder,
        record.step,
        record.groups,
        advantages,
        record.minibatches,
        record.teacher_rewards,
        run.records.replace,
    )
    write_buffer(folder, record.step, record.buffer, run.records.replace)
    if parallel.world_size() > 1:
        append_line(folder.ranks, times.record(record.step), run.records.append)
        run.slow_ranks.check(times)
    log.write(record.step, metrics.values())
    observability = run.config.observability
    log_samples(record.step, record.groups, observability.console_samples)
    if (record.step - 1) % observability.tracked_samples_interval == 0:
        log.write_samples(
            record.step,
            lambda: make_samples(
                record.groups, observability.tracked_samples, lambda ref: run.media.open(ref).pixels
            ),
        )


def _add_run_metrics(run: Run, metrics: PhaseMetrics) -> RankTimes:
    """Add what all ranks measured beside the step: memory, grading, servers, bad samples, traces.

    Returns:
        What the ranks did in the step.
    """
    of_rank = process_memory()
    of_rank.merge(run.profiler.take_failures())
    of_rank.merge(run.take_media_counts())
    of_rank.merge(run.take_weight_counts())
    of_rank.add("records/failed_writes", Sum(run.records.take_num_failed()))
    of_rank.add("records/waiting_bytes", Max(run.records.waiting_bytes))
    own = (of_rank, socket.gethostname(), dict(metrics.busy_seconds))
    gathered = parallel.gather_from_ranks(own)
    for measured, _, _ in gathered:
        metrics.merge(measured)
    times = RankTimes([host for _, host, _ in gathered], [busy for _, _, busy in gathered])
    metrics.merge(times.metrics())
    for replica in parallel.gather_from_replicas([run.take_losses()]):
        for losses in replica:
            metrics.merge(losses)
    health = run.stream.health
    num_left_out = sum(health.left_out.values())
    metrics.add("data/samples", Sum(health.num_good + health.num_bad + num_left_out))
    metrics.add("data/too_long", Sum(health.left_out.get(TOO_LONG, 0)))
    others = {reason: count for reason, count in health.left_out.items() if reason != TOO_LONG}
    for reason, count in {**health.counts, **others}.items():
        metrics.add(f"data/skipped/{reason}", Sum(count))
    return times


def refresh_report(run: Run, folder: RunFolder) -> None:
    """Draw the run's report, unless the run is to end; every rank calls this."""
    if not parallel.any_rank(run.stages.interruption.is_requested):
        parallel.on_rank_zero(lambda: _write_report(run, folder))


def _write_report(run: Run, folder: RunFolder) -> None:
    observability = run.config.observability
    if not observability.report:
        return
    # Here, because only rank 0 draws, and matplotlib takes a while to import.
    from zppo_mm.report.page import write_report

    try:
        # Every rank imports this module, and one of them draws.
        from zppo_mm.report.page import write_report

        write_report(
            folder.path, lambda ref: run.media.open(ref).pixels, observability.report_examples
        )
    except Exception:
        # A page about the run must not end it; tools/make_report.py draws it again.
        logger.exception("the report could not be written, the run goes on")


def export_student(run: Run, folder: RunFolder) -> None:
    """Export the trained student as a Hugging Face folder, its adapters merged, and the adapters by
    themselves beside it; every rank calls this.
    """
    model, source = run.policy.model, student_folder(run.config.model)
    processor_files = changed_processor_files(source, processor_overrides(run.config.data))
    export_hf_weights(model, source, folder.hf, processor_files)
    # With more trained than adapters, these alone would be another model.
    if adapters_of(model) is not None and not run.config.lora.also_train:
        export_adapter(model, source, folder.adapter)
    if parallel.rank() == 0:
        logger.info("trained model in %s, report in %s", folder.hf, folder.report)

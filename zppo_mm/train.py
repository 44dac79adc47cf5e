"""The run: build, resume, loop, save, export."""

from __future__ import annotations

import fcntl
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import DataError
from zppo_mm.build import Run, build_run, student_folder
from zppo_mm.config import RunConfig
from zppo_mm.config_io import flat_keys, save_config
from zppo_mm.errors import CheckpointError, ConfigError, ZppoError
from zppo_mm.evaluate import ask_held_out, summarise
from zppo_mm.models import parallel
from zppo_mm.models.export import export_hf_weights
from zppo_mm.models.lora import adapters_of
from zppo_mm.models.lora_export import export_adapter
from zppo_mm.models.worlds import World, divide_job
from zppo_mm.observability.logs import configure_logging
from zppo_mm.observability.metrics import Mean, Sum, process_memory
from zppo_mm.observability.report import write_report
from zppo_mm.observability.report_data import read_lines
from zppo_mm.observability.sinks import EVALUATION_FILE, PARITY_FILE, MetricsLog, append_evaluation, open_metrics_log
from zppo_mm.observability.transcripts import discard_steps_after, write_buffer, write_held_out_answers, write_transcript
from zppo_mm.parity.gate import check_parity
from zppo_mm.step import StepRecord, run_step
from zppo_mm.teacher.rank_channel import Channel
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.teacher_ranks import reach_teacher, serve_teacher
from zppo_mm.training import checkpoint

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
HF_FOLDER = "hf"
ADAPTER_FOLDER = "adapter"
LOCK_FILE = ".lock"
# What may change between two parts of a run: where and how it computes, how long it goes on, what it writes and looks at.
FREE_ON_RESUME = (
    "output_dir",
    "parallel.",
    "model.transformer_impl",
    "model.recompute",
    "train.train_iters",
    "train.micro_batch_tokens",
    "train.share_prompts",
    "rollout.max_batch_size",
    "teacher.endpoints",
    "teacher.num_ranks",
    "teacher.tensor_model_parallel_size",
    "teacher.pipeline_model_parallel_size",
    "teacher.api_key_env",
    "teacher.on_failure",
    "teacher.ask_ahead",
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
NO_STEP = -1


def run_folder(config: RunConfig) -> Path:
    """Return the folder that the run writes to."""
    return Path(config.output_dir) / (config.name or f"{config.method}-{config.modality}")


def train(config: RunConfig) -> Path:
    """Train from the start or from the newest checkpoint to the last step, then export.

    Every rank calls this; those of a teacher on ranks of its own answer until the others have ended. The folder of a run holds config.yaml,
    metrics.jsonl, evaluation.jsonl, evaluations/, parity.jsonl, transcripts/, buffer/, checkpoints/, hf/, adapter/ (with LoRA) and
    report.html.

    Returns:
        The run's folder.
    """
    folder = run_folder(config)
    world = divide_job(config.parallel, config.teacher)
    if world is not None and world.name == "teacher":
        serve_teacher(config, world)
    else:
        with reach_teacher(config, world) as channel:
            _train_student(config, folder, world, channel)
    return folder


def _train_student(config: RunConfig, folder: Path, world: World | None, channel: Channel | None) -> None:
    parallel.initialize(config.parallel, config.seed, world)
    parallel.end_with_launcher()
    configure_logging(folder, parallel.rank())
    with parallel.explain_lost_rank(), _only_run(folder):
        run = build_run(config, channel)
        try:
            done = _resume(run, folder)
            _prepare_folder(config, folder, done)
            if done < config.train.train_iters:
                check_parity(run, folder, max(done, 0))
            log = None
            if parallel.rank() == 0:
                log = open_metrics_log(config.observability, folder, config.train.train_iters, max(done, 0))
            _loop(run, folder, done, log)
            _finish(run, folder)
            if log is not None:
                log.close()
        finally:
            run.close()
    parallel.shutdown()


@contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock on rank 0 as long as the process lives; the system lets go of it when the process dies.

    Raises:
        ConfigError: On every rank, if another run writes to the folder.
    """
    lock = None
    free = True
    if parallel.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
    if not parallel.broadcast_object(free):
        raise ConfigError(
            f"{folder}: another process writes to this run, got a lock that is held, expected it free; wait for it to end or end it, "
            "or give another name"
        )
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _loop(run: Run, folder: Path, done: int, log: MetricsLog | None) -> None:
    """Run the steps that are left, evaluating and saving as they come due."""
    config = run.stages.config
    if done == NO_STEP:
        _evaluate(run, folder, 0)
    elif _is_evaluated(config, done) and not parallel.on_rank_zero(partial(_has_evaluation, folder, done)):
        # The teacher was lost at the end of that step; it may be the judge of answers too.
        _evaluate(run, folder, done)
    for step in range(max(done, 0) + 1, config.train.train_iters + 1):
        started = time.perf_counter()
        place = run.stream.state_dict()
        try:
            if run.teachers.ranks is not None:
                run.teachers.ranks.check()
            record = run_step(run.stages, step)
        except TeacherLostError:
            # The step has moved nothing but the stream: put back, it is taken up again by a resumed run.
            run.stream.load_state_dict(place)
            _save(run, folder, step - 1)
            raise
        is_last = step == config.train.train_iters
        if _is_evaluated(config, step) and not record.teacher_lost:
            with record.metrics.phase("evaluation"):
                _evaluate(run, folder, step)
        run.release_memory()
        _record(run, folder, record, time.perf_counter() - started, log)
        if is_last or step % config.checkpoint.interval == 0 or record.teacher_lost:
            _save(run, folder, step)
            _report(run, folder)
        if record.teacher_lost:
            raise record.teacher_lost


def _is_evaluated(config: RunConfig, step: int) -> bool:
    return step == config.train.train_iters or bool(config.evaluation.interval and step % config.evaluation.interval == 0)


def _has_evaluation(folder: Path, step: int) -> bool:
    return any(row["step"] == step for row in read_lines(folder / EVALUATION_FILE))


def _resume(run: Run, folder: Path) -> int:
    """Load the newest complete checkpoint; returns its step, or `NO_STEP`.

    Raises:
        CheckpointError: There are checkpoints, but none of them can be used.
        ConfigError: The folder has another run that is not to be continued.
    """
    config = run.stages.config
    checkpoints = folder / checkpoint.CHECKPOINTS_FOLDER
    if not config.checkpoint.resume:
        if checkpoint.latest(checkpoints) is not None:
            raise ConfigError(
                f"checkpoint.resume: {folder} holds checkpoints of an earlier run, got resume=false, expected a folder without; "
                "give another name or remove the folder"
            )
        return NO_STEP
    state = checkpoint.load_latest(checkpoints, run.policy)
    if state is None:
        _refuse_orphans(folder)
        return NO_STEP
    _check_same_run(config, state["config"], folder)
    run.stream.load_state_dict(state["stream"])
    run.stages.replay.load_state_dict(state["replay"])
    logger.info("resumed %s after step %d", folder, state["step"])
    return int(state["step"])


def _refuse_orphans(folder: Path) -> None:
    """Starting from nothing removes the records of earlier steps, which must not befall a finished run without its checkpoints.

    Raises:
        CheckpointError: The folder has an exported model but no checkpoint.
    """
    if (folder / HF_FOLDER).exists():
        raise CheckpointError(
            f"{folder}: a finished run without checkpoints, got {HF_FOLDER}/ but no checkpoint to continue from, expected both or neither; "
            "give another name, or remove the folder to start again"
        )


def _check_same_run(config: RunConfig, saved: dict[str, Any], folder: Path) -> None:
    """Compare the configuration with the checkpoint's.

    Raises:
        CheckpointError: A key that would change what the earlier steps mean is different.
    """
    # A checkpoint that is older than a key was made with its default.
    before, now, default = flat_keys(saved), flat_keys(asdict(config)), flat_keys(asdict(RunConfig()))
    changed = {key: (old, value) for key, value in now.items() if (old := before.get(key, default.get(key))) != value}
    fixed = {key: values for key, values in changed.items() if not _FURTHER_TEACHER.sub("teacher.", key).startswith(FREE_ON_RESUME)}
    if fixed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in fixed.items())
        raise CheckpointError(
            f"{folder}: the configuration is not the one of the checkpoint: {listed}; resume with the old values, or give the new run "
            "another name"
        )
    for key, (old, new) in changed.items():
        if parallel.rank() == 0:
            logger.warning("resumed with %s=%r, was %r", key, new, old)


def _save(run: Run, folder: Path, step: int) -> None:
    state = {
        "step": step,
        "config": asdict(run.stages.config),
        "stream": run.stream.state_dict(),
        "replay": run.stages.replay.state_dict(),
    }
    checkpoint.save(folder / checkpoint.CHECKPOINTS_FOLDER, step, run.policy, state, keep=run.stages.config.checkpoint.keep)


def _prepare_folder(config: RunConfig, folder: Path, done: int) -> None:
    """Write the configuration and take away what a killed run wrote after the checkpoint that goes on."""
    if parallel.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if done < config.train.train_iters:
            save_config(config, folder / CONFIG_FILE)
        discard_steps_after(folder, max(done, 0))
        if done == NO_STEP:
            (folder / EVALUATION_FILE).unlink(missing_ok=True)
            (folder / PARITY_FILE).unlink(missing_ok=True)
    parallel.barrier()


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
        parts = ", ".join(f"{source} {accuracy:.3f}" for source, accuracy in result.accuracy_by_source.items())
        logger.info("held-out accuracy after step %d: %.3f (%s)", step, result.accuracy, parts)


def _record(run: Run, folder: Path, record: StepRecord, seconds: float, log: MetricsLog | None) -> None:
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
    metrics.add("throughput/tokens_per_second", Mean(metrics.values().get("rollout/tokens", 0.0), seconds))
    if log is None:
        return
    advantages = {uid: values.tolist() for uid, values in record.advantages.items()}
    write_transcript(folder, record.step, record.groups, advantages, record.minibatches, record.teacher_rewards)
    write_buffer(folder, record.step, record.buffer_change)
    log.write(record.step, metrics.values())


def _finish(run: Run, folder: Path) -> None:
    """Export the trained student as a Hugging Face folder, its adapters merged, and the adapters by themselves beside it."""
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
            write_report(folder, lambda ref: run.media.open(ref).pixels, observability.report_examples)
        except Exception:
            # A page about the run must not end it; tools/make_report.py draws it again.
            logger.exception("the report could not be written, the run goes on")


def run_training(config: RunConfig) -> int:
    """Train and say what went wrong in one line if the user can mend it; returns the exit code."""
    try:
        train(config)
    except (ZppoError, DataError) as error:
        logger.error("%s", error)
        return 1
    return 0

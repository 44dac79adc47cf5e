"""One evaluation from its request to its results: questions, chunks of answers, numbers. Every rank
calls this.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data.atomic_files import new_folder
from data.errors import DataError
from data.health import SampleHealth
from data.imports.benchmarks import CONVERSION_VERSION, convert_benchmark, read_conversion
from zppo_mm.bundled.questions import bundled_sources
from zppo_mm.config.schema import RunConfig, SourceConfig
from zppo_mm.errors import ZppoError
from zppo_mm.evaluation.answers import AnsweredQuestion, AnswerFolder
from zppo_mm.evaluation.settings import EvaluationRequest, output_folder, read_config
from zppo_mm.evaluation.student import Student, build_student, describe_student
from zppo_mm.evaluation.summary import Summary, summarise_answers, summary_table
from zppo_mm.experience import PromptInstance
from zppo_mm.observability.logs import configure_logging
from zppo_mm.parallel import failures
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.held_out import HeldOut, evaluation_instances, held_out_questions
from zppo_mm.run.questions import configured_source

logger = logging.getLogger(__name__)

EVALUATED_STEP = 0
"""Recorded in rollouts, which nobody reads here."""
BATCHES_PER_CHUNK = 4
BENCHMARKS_FOLDER = "benchmarks"
LOG_FILE = "run.log"
PACKAGES = ("zppo-mm", "torch", "megatron-core", "transformers", "math-verify")
WARNED_SKIPPED_FRACTION = 0.05


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked, and what is left out before anything is asked.

    Attributes:
        chosen: The questions.
        skipped: Rows and samples that are none, by reason.
        listed: The first of them: where, reason, what is wrong.
        data: Folders with their fingerprints.
    """

    chosen: HeldOut
    skipped: dict[str, int]
    listed: list[list[str]]
    data: list[dict[str, str]]


def evaluate_model(request: EvaluationRequest) -> Summary:
    """Sample and grade responses to all questions, go on where an earlier start stopped, and write
    the results.

    Every rank calls this and gets the same.

    Raises:
        ZppoError: The model, an option or the folder of the results cannot be used, or rank 0
            failed at what it does alone.
        DataError: The questions cannot be used.
    """
    config = read_config(request)
    output = output_folder(request, Path(config.output_dir))
    parallel.initialize(config.parallel, config.seed)
    failures.end_with_launcher()
    configure_logging(output / LOG_FILE, parallel.rank())
    with failures.translate_collective_errors():
        student = build_student(config)
        try:
            questions = _questions(request, config, student)
            settings = describe_student(config, student) | {
                "num_questions": config.evaluation.num_questions,
                "data": questions.data,
            }
            folder = AnswerFolder(output)
            done = set(parallel.on_rank_zero(lambda: folder.open(settings)))
            num_rollouts = config.evaluation.num_rollouts
            batch = parallel.num_replicas() * config.rollout.max_batch_size
            size = request.questions_per_chunk or max(1, BATCHES_PER_CHUNK * batch // num_rollouts)
            _answer(student, questions.chosen, done, folder, num_rollouts, size)
            summary = parallel.on_rank_zero(lambda: _finish(folder, questions, settings, config))
        finally:
            student.close()
    parallel.shutdown()
    return summary


def run_evaluation(request: EvaluationRequest) -> tuple[int, str]:
    """Evaluate, and say what went wrong in one line if the user can fix it.

    Returns:
        The exit code, and the table of the results on rank 0.
    """
    try:
        summary = evaluate_model(request)
    except (ZppoError, DataError) as error:
        logger.error("%s", error)
        return 1, ""
    finally:
        # After an error too, or the process could be aborted at its end, with another exit code.
        parallel.leave()
    return 0, summary_table(summary) if os.environ.get("RANK", "0") == "0" else ""


def _questions(request: EvaluationRequest, config: RunConfig, student: Student) -> Questions:
    folders, skipped, listed = [], Counter[str](), []
    for source in [SourceConfig(path=str(path)) for path in request.data] or _own_sources(config):
        path = Path(source.path)
        if request.data and path.is_file():
            path = parallel.on_rank_zero(partial(_converted, path, request, config))
            source = replace(source, path=str(path))
        folders.append(configured_source(source, config, student.media.files))
        conversion = read_conversion(path)
        if conversion is not None:
            skipped.update(conversion.skipped)
            listed += conversion.listed
    health = SampleHealth(config.data.max_bad_fraction, config.data.strict)
    chosen = held_out_questions(
        folders,
        config.evaluation.num_questions,
        config.seed,
        health,
        student.grading.verifier.can_grade,
    )
    skipped.update(health.counts | health.left_out)
    listed += [list(entry) for entry in health.listed]
    data = [{"path": str(folder.path), "fingerprint": folder.fingerprint()} for folder in folders]
    return Questions(chosen, dict(skipped), listed, data)


def _own_sources(config: RunConfig) -> list[SourceConfig]:
    """Return the held-out data that the run itself is evaluated on."""
    sources = config.data.held_out
    if config.data.train and not sources:
        raise DataError(
            "data.held_out: the run has no held-out questions, got none, expected a source; name "
            "questions with --data"
        )
    return sources or bundled_sources(config, "held_out")


def _converted(file: Path, request: EvaluationRequest, config: RunConfig) -> Path:
    """Return the shards of a benchmark's file, made at the first use and shared by the evaluations
    of all models.
    """
    status = file.stat()
    root = request.media_root or file.parent
    made_from = [
        str(file.resolve()),
        status.st_size,
        status.st_mtime_ns,
        request.format,
        sorted(request.fields.items()),
        str(root.resolve()),
        CONVERSION_VERSION,
        *config.reward.functions,
    ]
    digest = hashlib.blake2b(json.dumps(made_from).encode(), digest_size=4).hexdigest()
    folder = Path(config.output_dir) / BENCHMARKS_FOLDER / f"{file.stem}-{digest}"
    if read_conversion(folder) is None:
        logger.info("converting %s into %s", file, folder)
        with new_folder(folder) as temporary:
            convert_benchmark(
                file,
                temporary,
                format_name=request.format,
                fields=request.fields,
                media_root=root,
                health=SampleHealth(max_bad_fraction=1.0),
                answer_types=config.reward.answer_types,
            )
    return folder


def _answer(
    student: Student,
    chosen: HeldOut,
    done: set[int],
    folder: AnswerFolder,
    num_rollouts: int,
    questions_per_chunk: int,
) -> None:
    """Answer the questions that are left, chunk by chunk."""
    instances = evaluation_instances(chosen, student.templates.plain_text)
    left = [index for index in range(len(instances)) if index not in done]
    if done:
        logger.info("%d of %d questions are answered already", len(done), len(instances))
    if num_rollouts > 1 and student.sampling.temperature == 0 and parallel.rank() == 0:
        logger.warning(
            "evaluation.num_rollouts: %d greedy responses per question are all the same; choose a "
            "temperature",
            num_rollouts,
        )
    for start in range(0, len(left), questions_per_chunk):
        began = time.perf_counter()
        chunk = left[start : start + questions_per_chunk]
        answers = _answer_chunk(student, instances, chunk, num_rollouts)
        student.grading.check()
        if parallel.rank() == 0:
            folder.add(answers)
            _log_progress(
                answers,
                len(instances) - len(left) + start + len(answers),
                len(instances),
                time.perf_counter() - began,
            )
        student.encoder.forget_media()
    _log_losses(student)


def _answer_chunk(
    student: Student, instances: Sequence[PromptInstance], indices: Sequence[int], num_rollouts: int
) -> list[AnsweredQuestion]:
    asked = [instances[index] for index in indices]
    groups = {
        group.uid: group
        for group in student.sampler.sample(asked, student.sampling, num_rollouts, EVALUATED_STEP)
    }
    failed = student.sampler.failed
    return [
        AnsweredQuestion.of(index, instance, groups.get(instance.uid), failed.get(instance.uid, ""))
        for index, instance in zip(indices, asked, strict=True)
    ]


def _log_progress(
    answers: Sequence[AnsweredQuestion], num_done: int, num_all: int, seconds: float
) -> None:
    num_graded = sum(len(each.graded) for each in answers)
    num_correct = sum(each.num_correct for each in answers)
    num_tokens = sum(response.num_tokens for each in answers for response in each.responses)
    accuracy = f"{num_correct / num_graded:.3f}" if num_graded else "-"
    logger.info(
        "evaluated %d/%d questions  accuracy of these %d: %s  tokens/s %.0f  seconds %.1f",
        num_done,
        num_all,
        len(answers),
        accuracy,
        num_tokens / seconds,
        seconds,
    )


def _log_losses(student: Student) -> None:
    """Log what the grader could not do; a response that it could not compare has no reward."""
    losses: Counter[str] = Counter()
    for replica in parallel.gather_from_replicas([student.grading_losses()]):
        for each in replica:
            losses.update(each)
    if parallel.rank() == 0 and any(losses.values()):
        logger.warning(
            "grading since this start: %s",
            ", ".join(f"{name} {count}" for name, count in losses.items() if count),
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # A clone runs without being installed.
        return "not installed"


def _finish(
    folder: AnswerFolder, questions: Questions, settings: Mapping[str, Any], config: RunConfig
) -> Summary:
    answers = folder.read_complete(len(questions.chosen))
    summary = summarise_answers(
        answers, questions.skipped, config.seed, config.data.max_prompt_tokens
    )
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    listed = questions.listed + [
        [each.id, each.skipped, "see the log"] for each in answers if each.skipped
    ]
    folder.finish(
        answers, {"settings": settings, "versions": versions, **asdict(summary), "listed": listed}
    )
    if summary.skipped_fraction > WARNED_SKIPPED_FRACTION:
        logger.warning(
            "%.1f %% of the questions were skipped: %s",
            100 * summary.skipped_fraction,
            summary.skipped,
        )
    logger.info("results and all answers in %s", folder.folder)
    return summary

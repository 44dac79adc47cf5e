"""The questions of an evaluation: a run's own, shards, or tables that are made into shards once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.atomic_files import new_folder
from data.errors import DataError
from data.health import SampleHealth
from data.imports.benchmark_formats import BenchmarkFormat
from data.imports.benchmarks import CONVERSION_VERSION, convert_benchmark, read_conversion
from zppo_mm.bundled.questions import bundled_sources
from zppo_mm.config.schema import RunConfig, SourceConfig
from zppo_mm.evaluation.settings import EvaluationRequest
from zppo_mm.evaluation.student import Student
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.held_out import HeldOut, held_out_questions
from zppo_mm.run.questions import configured_source

logger = logging.getLogger(__name__)

BENCHMARKS_FOLDER = "benchmarks"


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


def requested_questions(
    request: EvaluationRequest, config: RunConfig, student: Student
) -> Questions:
    """Return the questions of `--data`, or the run's own held-out ones; every rank calls this.

    Raises:
        DataError: They cannot be used.
    """
    if not request.data:
        return read_questions(_own_sources(config), config, student)
    sources = []
    for path in request.data:
        if path.is_file():
            root = request.media_root or path.parent
            make = partial(
                converted,
                path,
                [path],
                root,
                config,
                format_name=request.format,
                fields=request.fields,
            )
            path = parallel.on_rank_zero(make)
        sources.append(SourceConfig(path=str(path)))
    return read_questions(sources, config, student)


def read_questions(
    sources: Sequence[SourceConfig], config: RunConfig, student: Student
) -> Questions:
    """Return the questions of some sources that can be asked.

    Raises:
        DataError: They cannot be used, or there is none.
    """
    skipped, listed = Counter[str](), []
    folders = [configured_source(source, config, student.media.files) for source in sources]
    for source in sources:
        conversion = read_conversion(source.path)
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


def converted(
    source: Path,
    files: Sequence[Path],
    media_root: Path,
    config: RunConfig,
    *,
    format_name: str = "",
    fields: Mapping[str, str] | None = None,
    formats: Mapping[str, BenchmarkFormat] | None = None,
) -> Path:
    """Return the shards of a benchmark's tables, made at the first use and shared by the
    evaluations of all models; rank 0 calls this alone.

    Args:
        source: The one table, or the folder of the tables.
        files: The tables.
        media_root: What media paths start from.
        config: Of the evaluation.
        format_name: How the tables are read; empty means by their columns.
        fields: Columns by part of a question.
        formats: Declared benchmarks, where they are not those of the project.

    Raises:
        DataError: The tables cannot be used.
    """
    made_from = [
        *([str(each.resolve()), each.stat().st_size, each.stat().st_mtime_ns] for each in files),
        format_name,
        sorted((fields or {}).items()),
        repr(formats[format_name]) if formats and format_name else "",
        str(media_root.resolve()),
        CONVERSION_VERSION,
        *config.reward.functions,
    ]
    digest = hashlib.blake2b(json.dumps(made_from).encode(), digest_size=4).hexdigest()
    folder = Path(config.output_dir) / BENCHMARKS_FOLDER / f"{source.stem}-{digest}"
    if read_conversion(folder) is None:
        logger.info("converting %s into %s", source, folder)
        with new_folder(folder) as temporary:
            convert_benchmark(
                source,
                temporary,
                files=files,
                format_name=format_name,
                formats=formats,
                fields=fields,
                media_root=media_root,
                health=SampleHealth(max_bad_fraction=1.0),
                answer_types=config.reward.answer_types,
            )
    return folder

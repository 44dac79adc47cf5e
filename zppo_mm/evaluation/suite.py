"""A suite of declared benchmarks: those that lie on disk, one evaluation each with one loaded
model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data.atomic_files import write_atomically
from data.errors import DataError
from data.imports.benchmark_formats import DECLARED, BenchmarkFormat, load_formats
from data.sources.listing import list_tables
from zppo_mm.config.schema import RunConfig, SourceConfig
from zppo_mm.evaluation.questions import Questions, converted, read_questions
from zppo_mm.evaluation.settings import EvaluationRequest
from zppo_mm.evaluation.student import Student
from zppo_mm.evaluation.suite_scores import (
    SUITE_FILE,
    Score,
    SuiteResult,
    counted,
    families_of,
    gains_over,
    macro_averages,
    read_scores,
    score_of,
    suite_table,
    suite_text,
)
from zppo_mm.evaluation.summary import Summary
from zppo_mm.parallel import groups as parallel

logger = logging.getLogger(__name__)

PAPER = "paper"
JUDGE_MODES = {"rules_and_judge": "fallback", "judge": "open"}
"""What the judge decides, by scoring; nothing for all others."""

Answer = Callable[[Student, RunConfig, Questions, Path], Summary]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Where a benchmark lies.

    Attributes:
        folder: All of it, media included.
        files: Its tables.
    """

    folder: Path
    files: tuple[Path, ...]


def evaluate_suite(
    request: EvaluationRequest,
    config: RunConfig,
    student: Student,
    output: Path,
    answer: Answer,
) -> str:
    """Evaluate all benchmarks of a suite that lie on disk; every rank calls this.

    Args:
        request: Names the suite, and the folder with a folder for each benchmark.
        config: Of the evaluation.
        student: Samples and grades.
        output: Folder of the results, one in it for each benchmark.
        answer: Answers questions and writes the results.

    Returns:
        The table of the scores.

    Raises:
        DataError: The declarations cannot be read.
        ConfigError: The baseline or a judge's prompt cannot be used.
    """
    formats = open_suite(request.suite)
    baseline = read_scores(request.baseline) if request.baseline else {}
    shards, missing, left_out = parallel.on_rank_zero(
        lambda: _prepare(formats, request.data[0], config)
    )
    scores: dict[str, Score] = {}
    for name, folder in shards.items():
        known = formats[name]
        if known.scoring == "judge" and student.grading.judge is None:
            left_out[name] = "needs a judge"
            continue
        mode = JUDGE_MODES.get(known.scoring, "never")
        own = replace(
            config,
            evaluation=replace(config.evaluation, judge=mode),
            reward=replace(
                config.reward, judge_template=known.judge or config.reward.judge_template
            ),
        )
        graded = student.graded_by(mode, known.judge)
        try:
            questions = read_questions([SourceConfig(path=str(folder))], own, graded)
        except DataError as error:
            left_out[name] = str(error)
            continue
        logger.info("%s: %d questions", known.title, len(questions.chosen))
        summary = answer(graded, own, questions, output / name)
        scores[name] = score_of(summary, known, is_graded=known.scoring == "anls")
    gains, families = gains_over(baseline, scores), families_of(scores)
    result = SuiteResult(
        request.suite,
        counted([known.family for known in formats.values()]),
        scores,
        missing,
        left_out,
        macro_averages({name: each.value for name, each in scores.items()}, families, config.seed),
        gains,
        macro_averages(gains, families, config.seed, "gain"),
    )
    parallel.on_rank_zero(lambda: write_atomically(output / SUITE_FILE, suite_text(result)))
    return suite_table(result)


def open_suite(suite: str) -> dict[str, BenchmarkFormat]:
    """Return the benchmarks of a suite, by the names of their declarations.

    Raises:
        DataError: There are none, or one cannot be read.
    """
    formats = load_formats(DECLARED if suite == PAPER else Path(suite))
    unnamed = [name for name, known in formats.items() if not known.family or not known.title]
    if unnamed:
        raise DataError(
            f"--suite {suite}: {unnamed[0]} has no title or no family, expected both; declare them"
        )
    return formats


def find_benchmark(name: str, known: BenchmarkFormat, root: Path) -> OnDisk | None:
    """Return where a benchmark lies below a folder; `None` if it does not.

    Its own folder has the name of its declaration, or that of its published dataset. In it are the
    declared files, or what `datasets` saved.

    Raises:
        DataError: There is a folder whose tables are not known.
    """
    for folder in _folders(name, known, root):
        if not folder.is_dir():
            continue
        for pattern in known.files:
            files = sorted(each for each in folder.glob(pattern) if each.is_file())
            if files:
                return OnDisk(folder, tuple(files))
        listed = list_tables(str(folder))
        if listed is not None:
            return OnDisk(folder, tuple(listed.files))
    return None


def _folders(name: str, known: BenchmarkFormat, root: Path) -> list[Path]:
    return [root / each for each in (name, known.dataset.rpartition("/")[2]) if each]


def _prepare(
    formats: Mapping[str, BenchmarkFormat], root: Path, config: RunConfig
) -> tuple[dict[str, Path], dict[str, str], dict[str, str]]:
    """Return the shards of the benchmarks that lie on disk, what is missing, and what cannot be
    read.
    """
    shards: dict[str, Path] = {}
    missing: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for name, known in formats.items():
        try:
            found = find_benchmark(name, known, root)
            if found is None:
                looked = " or ".join(map(str, _folders(name, known, root)))
                missing[name] = f"{known.dataset}: {looked}"
                continue
            shards[name] = converted(
                found.folder,
                found.files,
                found.folder,
                config,
                format_name=name,
                formats=formats,
            )
        except DataError as error:
            unreadable[name] = str(error)
    return shards, missing, unreadable

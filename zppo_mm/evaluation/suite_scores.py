"""Scores of a suite of benchmarks: macro-averages by family, gains over a baseline, and intervals
over the choice of benchmarks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.imports.benchmark_formats import FAMILIES, BenchmarkFormat
from zppo_mm.errors import ConfigError
from zppo_mm.evaluation.estimators import Estimate, estimate
from zppo_mm.evaluation.summary import Summary
from zppo_mm.text_table import text_table

SUITE_FILE = "suite.json"
ALL = "all"


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one benchmark.

    Attributes:
        title: Its name in tables.
        family: Over which scores are averaged.
        value: From 0 to 1: the mean similarity for ANLS, the fraction of right responses for all
            others.
        num_questions: Answered questions.
        skipped_fraction: Of its questions that were not.
        in_paper: Whether the paper is known to have it.
    """

    title: str
    family: str
    value: float
    num_questions: int
    skipped_fraction: float
    in_paper: bool


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """What became of a suite.

    Attributes:
        suite: Its name.
        num_declared: Its benchmarks by family.
        scores: By benchmark.
        missing: Benchmarks that are not on disk, with what was looked for.
        left_out: Those that are and could not be asked, with the reason.
        macro: Mean over benchmarks by family, with the interval over their choice.
        gains: Of each benchmark over the baseline; empty without one.
        macro_gain: Mean of the gains by family, with the interval.
    """

    suite: str
    num_declared: Mapping[str, int]
    scores: Mapping[str, Score]
    missing: Mapping[str, str]
    left_out: Mapping[str, str]
    macro: Mapping[str, Estimate] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    macro_gain: Mapping[str, Estimate] = field(default_factory=dict)


def score_of(summary: Summary, known: BenchmarkFormat, is_graded: bool) -> Score:
    """Return the score of a benchmark.

    Args:
        summary: Of its evaluation.
        known: The benchmark.
        is_graded: Whether rewards between 0 and 1 count as such.
    """
    overall = summary.overall
    value = overall.reward if is_graded or 1 not in overall.pass_at else overall.pass_at[1].value
    return Score(
        known.title,
        known.family,
        value,
        summary.num_questions,
        summary.skipped_fraction,
        known.in_paper,
    )


def macro_averages(
    values: Mapping[str, float], families: Mapping[str, str], seed: int, *path: str
) -> dict[str, Estimate]:
    """Return the mean over the benchmarks of each family, and over all, each benchmark counting the
    same; the interval is that of resampled benchmarks.

    Args:
        values: By benchmark.
        families: Of the benchmarks.
        seed: Of the resampling.
        *path: Names its random stream.

    Source: ZPPO (arXiv 2606.18216), evaluation: a bootstrap whose clusters are the benchmarks.
    """
    of_family = {
        family: [value for name, value in values.items() if families[name] == family]
        for family in FAMILIES
    } | {ALL: list(values.values())}
    return {
        family: estimate(some, seed, "suite", *path, family)
        for family, some in of_family.items()
        if some
    }


def gains_over(baseline: Mapping[str, Score], scores: Mapping[str, Score]) -> dict[str, float]:
    """Return by how much the benchmarks that both have are better."""
    return {
        name: score.value - baseline[name].value
        for name, score in scores.items()
        if name in baseline
    }


def suite_text(result: SuiteResult) -> str:
    """Return what `suite.json` holds."""
    return json.dumps(asdict(result), ensure_ascii=False, indent=1)


def read_scores(folder: Path) -> dict[str, Score]:
    """Return the scores of a finished suite.

    Raises:
        ConfigError: The folder has none.
    """
    path = folder / SUITE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["scores"]
        return {name: Score(**score) for name, score in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--baseline: {path} is not readable ({error}), expected what an evaluation with "
            "--suite wrote; name the folder of its results"
        ) from error


def suite_table(result: SuiteResult) -> str:
    """Return the scores in percent as aligned text, and what is not among them."""
    has_gains = bool(result.gains)
    head = ["", "questions", "skipped", "score [95 %]", *(["gain [95 %]"] if has_gains else [])]
    rows: list[list[str]] = []
    for family in FAMILIES:
        for name, score in result.scores.items():
            if score.family == family:
                rows.append(_row(result, name, score, has_gains))
        if family in result.macro:
            rows.append(_macro_row(result, family, has_gains))
    if ALL in result.macro:
        rows.append(_macro_row(result, ALL, has_gains))
    lines = [text_table(head, rows)] if rows else ["no benchmark was evaluated"]
    lines += [f"not on disk: {name} ({what})" for name, what in result.missing.items()]
    lines += [f"left out: {name} ({what})" for name, what in result.left_out.items()]
    guessed = [name for name, score in result.scores.items() if not score.in_paper]
    if guessed:
        lines.append(f"not confirmed as the paper's: {', '.join(guessed)}")
    return "\n".join(lines)


def _row(result: SuiteResult, name: str, score: Score, has_gains: bool) -> list[str]:
    gain = [f"{100 * result.gains[name]:+.1f}" if name in result.gains else "-"]
    shown = [f"{score.skipped_fraction:.1%}", f"{100 * score.value:.1f}"]
    return [score.title, str(score.num_questions), *shown, *(gain if has_gains else [])]


def _macro_row(result: SuiteResult, family: str, has_gains: bool) -> list[str]:
    names = [name for name, score in result.scores.items() if family in (ALL, score.family)]
    num_questions = sum(result.scores[name].num_questions for name in names)
    declared = result.num_declared if family == ALL else {family: result.num_declared[family]}
    title = f"{family}: {len(names)} of {sum(declared.values())}"
    gain = _shown(result.macro_gain.get(family), "+.1f")
    return [
        title,
        str(num_questions),
        "",
        _shown(result.macro[family], ".1f"),
        *([gain] if has_gains else []),
    ]


def _shown(value: Estimate | None, form: str) -> str:
    if value is None:
        return "-"
    mean, low, high = (format(100 * each, form) for each in (value.value, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def families_of(scores: Mapping[str, Score]) -> dict[str, str]:
    """Return the family of each benchmark."""
    return {name: score.family for name, score in scores.items()}


def counted(families: Sequence[str]) -> dict[str, int]:
    """Return how many benchmarks a suite has of each family."""
    return {family: list(families).count(family) for family in FAMILIES}

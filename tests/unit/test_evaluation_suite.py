"""A suite of benchmarks: where they lie, how they are scored, and the numbers over all of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.imports.benchmark_formats import DECLARED, load_formats
from data.question import Question
from tests.support.benchmark_tables import write_table
from tests.support.declared_rows import ROWS
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError
from zppo_mm.evaluation.questions import converted
from zppo_mm.evaluation.settings import EvaluationRequest, output_folder, read_config
from zppo_mm.evaluation.student import Student
from zppo_mm.evaluation.suite import JUDGE_MODES, find_benchmark, open_suite
from zppo_mm.evaluation.suite_scores import (
    SUITE_FILE,
    Score,
    SuiteResult,
    families_of,
    gains_over,
    macro_averages,
    read_scores,
    suite_table,
    suite_text,
)
from zppo_mm.rewards.judge import LlmJudge, load_judge_template
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.judging import Grading

VALUES = {"a": 0.1, "b": 0.5, "c": 0.9, "d": 0.2, "e": 0.6}
FAMILY = {"a": "image", "b": "image", "c": "image", "d": "text", "e": "text"}
INTERVAL_TOLERANCE = 0.03
"""Percentiles of 2,000 and of 200,000 resamples of three values."""


def score(value: float, family: str, in_paper: bool = False) -> Score:
    return Score(f"The {family} one", family, value, 10, 0.1, in_paper)


def test_every_benchmark_counts_the_same_and_intervals_resample_benchmarks() -> None:
    macro = macro_averages(VALUES, FAMILY, 0)
    # (0.1 + 0.5 + 0.9) / 3, (0.2 + 0.6) / 2, all five.
    assert {name: round(each.value, 12) for name, each in macro.items()} == {
        "image": 0.5,
        "text": 0.4,
        "all": 0.46,
    }
    random = np.random.default_rng(1)
    drawn = random.choice([0.1, 0.5, 0.9], size=(200_000, 3)).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert macro["image"].low == pytest.approx(low, abs=INTERVAL_TOLERANCE)
    assert macro["image"].high == pytest.approx(high, abs=INTERVAL_TOLERANCE)
    assert "video" not in macro


def test_gains_are_of_benchmarks_that_both_have() -> None:
    before = {"a": score(0.25, "image"), "gone": score(0.9, "image")}
    after = {"a": score(0.75, "image"), "new": score(0.5, "text")}
    assert gains_over(before, after) == {"a": 0.5}


def test_the_table_has_averages_and_what_is_missing(tmp_path: Path) -> None:
    scores = {
        "first": score(0.25, "image", in_paper=True),
        "second": score(0.75, "image"),
        "third": score(0.5, "text"),
    }
    gains = {"first": 0.125}
    families = families_of(scores)
    result = SuiteResult(
        "mine",
        {"text": 2, "image": 3, "video": 1},
        scores,
        {"gone": "a/gone: data/gone"},
        {"open": "needs a judge"},
        macro_averages({name: each.value for name, each in scores.items()}, families, 0),
        gains,
        macro_averages(gains, families, 0, "gain"),
    )
    lines = suite_table(result).splitlines()
    shown = [" ".join(line.split()) for line in lines]
    assert shown[0] == "questions skipped score [95 %] gain [95 %]"
    assert "The image one 10 10.0% 25.0 +12.5" in shown
    assert "The image one 10 10.0% 75.0 -" in shown
    assert any(line.startswith("image: 2 of 3 20 50.0 [25.0, 75.0] +12.5 [+12.5") for line in shown)
    assert any(line.startswith("all: 3 of 6 30 50.0 [") for line in shown)
    assert shown[-3:] == [
        "not on disk: gone (a/gone: data/gone)",
        "left out: open (needs a judge)",
        "not confirmed as the paper's: second, third",
    ]
    (tmp_path / SUITE_FILE).write_text(suite_text(result))
    assert read_scores(tmp_path) == scores
    assert json.loads((tmp_path / SUITE_FILE).read_text())["macro"]["all"] == asdict(
        result.macro["all"]
    )


def test_benchmarks_are_found_by_either_name_and_as_saved_by_datasets(tmp_path: Path) -> None:
    known = load_formats(DECLARED)["gsm8k"]
    assert find_benchmark("gsm8k", known, tmp_path) is None
    saved = tmp_path / "gsm8k"
    saved.mkdir()
    (saved / "data-0.arrow").write_bytes(b"ARROW1")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    found = find_benchmark("gsm8k", known, tmp_path)
    assert found is not None
    assert [each.name for each in found.files] == ["data-0.arrow"]
    # The declared files come first.
    (saved / "main").mkdir()
    for number in (1, 0):
        write_table(saved / "main" / f"test-{number}.parquet", [ROWS["gsm8k"][0]])
    found = find_benchmark("gsm8k", known, tmp_path)
    assert found is not None
    assert [each.name for each in found.files] == ["test-0.parquet", "test-1.parquet"]
    published = load_formats(DECLARED)["infographicvqa"]
    (tmp_path / "DocVQA" / "InfographicVQA").mkdir(parents=True)
    table = tmp_path / "DocVQA" / "InfographicVQA" / "validation-0.parquet"
    write_table(table, [ROWS["infographicvqa"][0]])
    found = find_benchmark("infographicvqa", published, tmp_path)
    assert found is not None
    assert (found.folder.name, found.files) == ("DocVQA", (table,))


def test_tables_are_made_into_shards_once_until_files_or_declaration_change(
    tmp_path: Path,
) -> None:
    table = write_table(tmp_path / "t.parquet", [ROWS["gsm8k"][0]])
    config = load_config(None, [f"output_dir={tmp_path}"])
    formats = load_formats(DECLARED)

    def make(name: str) -> Path:
        return converted(tmp_path, [table], tmp_path, config, format_name=name, formats=formats)

    first = make("gsm8k")
    assert make("gsm8k") == first
    formats["gsm8k"] = formats["math500"]
    with pytest.raises(DataError, match=r"no column for question"):
        make("gsm8k")


def test_each_scoring_says_what_the_judge_decides() -> None:
    formats = load_formats(DECLARED)
    assert {known.scoring for known in formats.values() if known.judge} <= JUDGE_MODES.keys()
    for known in formats.values():
        if known.judge:
            assert "{reference}" in load_judge_template(known.judge)


def test_a_benchmarks_own_prompt_is_asked_and_counted_with_the_others() -> None:
    asked: list[str] = []

    def complete(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return ["no verdict" for _ in prompts]

    judge = LlmJudge(complete, "run: {question} {response} {reference}", 100)  # type: ignore[arg-type]
    own = judge.with_template("own: {question} {response} {reference}")
    question = Question("q", "Is it?", (), "Yes", "math")
    with Verifier(judge=judge, judge_mode="never") as verifier:
        assert verifier.verify(question, r"\boxed{Sure}").reward == 0
        assert asked == []
        verifier.with_judge(own, "fallback").verify(question, r"\boxed{Sure}")
    assert [prompt.split(":")[0] for prompt in asked] == ["own"]
    assert (judge.counts["judge_malformed"], judge.malformed_example) == (1, "no verdict")


def test_a_suite_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("columns: {question: q, answer: a}\n")
    with pytest.raises(DataError, match=r"mine has no title or no family, expected both"):
        open_suite(str(tmp_path))
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nfamily: text\ncolumns: {question: q, answer: a}\n"
    )
    assert list(open_suite(str(tmp_path))) == ["mine"]


def test_a_suite_needs_its_folder_and_a_baseline_its_suite(tmp_path: Path) -> None:
    for request, message in [
        (
            EvaluationRequest(model=STUDENT_DIR, suite="paper", data=(tmp_path / "a.json",)),
            r"--suite paper: no folder of benchmarks, got --data .*a\.json, expected the one",
        ),
        (
            EvaluationRequest(model=STUDENT_DIR, data=(tmp_path,), baseline=tmp_path),
            r"--baseline: nothing to compare, got no --suite",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_config(request)
    request = EvaluationRequest(model=STUDENT_DIR, data=(tmp_path,), suite="paper")
    config = read_config(request)
    assert {"anls", "relaxed"} <= set(config.reward.answer_types)
    assert output_folder(request, Path("runs")) == Path("runs/evaluations/student/paper")
    with pytest.raises(ConfigError, match=r"--baseline: .*suite\.json is not readable"):
        read_scores(tmp_path)


def test_a_student_is_graded_as_its_benchmark_says() -> None:
    judge = LlmJudge(lambda prompts: [], "run: {question} {response} {reference}", 100)
    own = load_formats(DECLARED)["charxiv"].judge
    open_question = Question("q", "Which?", (), "the solid one", "open")
    with Verifier(judge=judge, judge_mode="fallback") as verifier:
        # Only what grades is looked at.
        nothing: Any = None
        sampler = GroupSampler(nothing, nothing, verifier, nothing)
        grading = Grading(verifier, judge, None, lambda: None)
        student = Student(sampler, nothing, nothing, nothing, nothing, grading)
        rules = student.graded_by("never", "")
        assert rules.grading.judge is None
        assert not rules.grading.verifier.can_grade(open_question)
        judged = student.graded_by("open", own)
        assert judged.grading.judge not in (None, judge)
        assert judged.grading.verifier.can_grade(open_question)
        assert student.grading.judge is judge

"""Held-out accuracy of methods and their differences to a baseline, with intervals, over all
questions and over parts of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zppo_mm.comparison.intervals import (
    Estimate,
    FloatArray,
    bootstrap_means,
    interval,
    mean_scores,
)
from zppo_mm.comparison.results import Answered, Answers, Results, RunResult


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the held-out questions: all, those of one modality, or those of one source."""

    name: str
    has: Callable[[Answered], bool]


@dataclass(frozen=True, slots=True)
class MethodAccuracy:
    """A method on some held-out questions, over its finished seeds; fractions between 0 and 1.

    Attributes:
        seeds: Seeds that are part of it.
        num_questions: Questions, over all these seeds.
        num_unpaired: Of these, questions that the differences leave out because the baseline has no
            answer to them.
        before: Mean accuracy before training.
        after: Mean accuracy after the last step.
        gain: `after` minus `before`, on the same questions.
        curve: Mean accuracy over all evaluations after step 0.
        difference: `after` minus the baseline's, over the seeds that both have; `None` for the
            baseline and where there is none.
        curve_difference: The same of `curve`.
    """

    seeds: tuple[int, ...]
    num_questions: int
    num_unpaired: int
    before: float
    after: Estimate
    gain: Estimate
    curve: Estimate
    difference: Estimate | None
    curve_difference: Estimate | None


def parts_of(results: Results) -> list[Part]:
    """Return the parts that the plan names; without any all questions, then every modality and
    every source, where there are several, equal parts once.
    """
    if results.plan.parts:
        return [Part(name, _of_sources(each)) for name, each in results.plan.parts.items()]
    seen = {
        answered
        for label in results.plan.labels
        for result in results.counted(label).values()
        for answered in result.answers[0].values()
    }
    pairs = {(answered.modality, answered.source) for answered in seen}
    parts, known = [Part("all", lambda answered: True)], [pairs]
    for kind in (0, 1):
        for name in sorted({pair[kind] for pair in pairs}):
            members = {pair for pair in pairs if pair[kind] == name}
            if members not in known:
                known.append(members)
                parts.append(Part(name or "(no source)", _is_in(members)))
    return parts


def method_accuracy(results: Results, label: str, part: Part) -> MethodAccuracy | None:
    """Return a method's accuracy on a part of the questions; `None` if it has no finished run with
    such questions.
    """
    own, base = results.counted(label), results.counted(results.plan.baseline)
    is_baseline = label == results.plan.baseline
    common = [seed for seed in own if seed in base]
    pairs = {seed: _scores([own[seed], base[seed]], part) for seed in common}
    alone = {seed: _scores([own[seed]], part) for seed in own}
    pairs, alone = (
        {seed: scores for seed, scores in each.items() if scores.size} for each in (pairs, alone)
    )
    if not alone:
        return None
    # With the same seeds and questions these draws are those of the pairs too, so that the
    # intervals belong together.
    draws, means = bootstrap_means(list(alone.values())), mean_scores(list(alone.values()))
    differences: list[Estimate | None] = [None, None]
    if pairs and not is_baseline:
        paired_draws, paired_means = (
            bootstrap_means(list(pairs.values())),
            mean_scores(list(pairs.values())),
        )
        differences = [
            interval(
                paired_means[i] - paired_means[i + 3], paired_draws[:, i] - paired_draws[:, i + 3]
            )
            for i in (AFTER, CURVE)
        ]
    return MethodAccuracy(
        seeds=tuple(alone),
        num_questions=sum(scores.shape[1] for scores in alone.values()),
        num_unpaired=sum(alone[seed].shape[1] - scores.shape[1] for seed, scores in pairs.items()),
        before=float(means[BEFORE]),
        after=interval(means[AFTER], draws[:, AFTER]),
        gain=interval(means[AFTER] - means[BEFORE], draws[:, AFTER] - draws[:, BEFORE]),
        curve=interval(means[CURVE], draws[:, CURVE]),
        difference=differences[0],
        curve_difference=differences[1],
    )


BEFORE, AFTER, CURVE = range(3)
"""Rows of one method's scores."""


def contrast(results: Results, factors: Mapping[str, float], part: Part) -> Estimate | None:
    """Return a sum of accuracies after the last step, each times its factor, over the seeds and
    questions that all its methods have; `None` without any.

    Args:
        results: All runs.
        factors: By label of a method.
        part: Which questions.
    """
    runs = [results.counted(label) for label in factors]
    common = [seed for seed in runs[0] if all(seed in of_label for of_label in runs)]
    scores = [_scores([of_label[seed] for of_label in runs], part) for seed in common]
    scores = [of_seed[AFTER::3] for of_seed in scores if of_seed.size]
    if not scores:
        return None
    weights = np.array(list(factors.values()))
    return interval(mean_scores(scores) @ weights, bootstrap_means(scores) @ weights)


def _scores(runs: Sequence[RunResult], part: Part) -> FloatArray:
    """Return `[3 x runs, questions]`: before, after, and mean of the curve of every run, on the
    questions that all have everywhere.
    """
    evaluations = [_evaluations(run) for run in runs]
    asked = [set.intersection(*(set(answers) for answers in of_run)) for of_run in evaluations]
    first = evaluations[0][0]
    questions = [
        question
        for question in first
        if part.has(first[question]) and all(question in of_run for of_run in asked)
    ]
    rows = []
    for of_run in evaluations:
        by_step = np.array(
            [[answers[question].accuracy for question in questions] for answers in of_run]
        )
        rows += [by_step[0], by_step[-1], by_step[1:].mean(axis=0)]
    return np.stack(rows)


def _evaluations(run: RunResult) -> list[Answers]:
    """Return the evaluations of a counted run up to its last step, ascending."""
    return [run.answers[step] for step in sorted(run.answers) if step <= run.last_step]


def _of_sources(sources: Collection[str]) -> Callable[[Answered], bool]:
    return lambda answered: answered.source in sources


def _is_in(pairs: set[tuple[str, str]]) -> Callable[[Answered], bool]:
    return lambda answered: (answered.modality, answered.source) in pairs

"""What else methods are compared by: fates of buffered questions, cost of a step, answers to
reformulated prompts.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from zppo_mm.comparison.intervals import Estimate, bootstrap_ratios, interval
from zppo_mm.comparison.results import Results
from zppo_mm.report.run_record import RunRecord

NUM_FINAL_STEPS = 10
"""Steps that count as the end of a run."""
PHASES = ("data", "plain_rollout", "teacher", "reformulated_rollout", "old_logprobs", "update")
TOKENS = (
    ("sampled", "rollout/tokens"),
    ("of the teacher", "teacher/tokens"),
    ("trained on", "batch/loss_tokens"),
)
FATES = ("graduated", "admitted")
FINAL = (
    ("plain accuracy", "accuracy/plain"),
    ("BCQ accuracy", "accuracy/bcq"),
    ("NCQ accuracy", "accuracy/ncq"),
    ("BCQ: right candidate's answer", "audit/bcq_right"),
    ("BCQ: wrong candidate's answer", "audit/bcq_wrong"),
    ("NCQ: an answer listed as wrong", "audit/ncq_listed"),
)


@dataclass(frozen=True, slots=True)
class Fates:
    """Admissions to the replay buffer and what became of them, added up over seeds.

    Attributes:
        admitted: By accuracy at admission in percent, as metrics name it.
        graduated: Likewise.
        evicted: Likewise.
        graduated_visits: Graduations by number of visits.
        evicted_visits: Evictions by number of visits.
    """

    admitted: Counter[str]
    graduated: Counter[str]
    evicted: Counter[str]
    graduated_visits: Counter[str]
    evicted_visits: Counter[str]

    @property
    def num_left(self) -> int:
        """Questions that are still in the buffer."""
        return self.admitted.total() - self.graduated.total() - self.evicted.total()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step takes; medians of seconds and means of tokens over the steps of all seeds, `None`
    where nothing was recorded.

    Attributes:
        seconds: Of a step, evaluation left out.
        ratio: These seconds as a multiple of the baseline's.
        phases: Seconds by phase.
        tokens: By what was done with them, see `TOKENS`.
    """

    seconds: float
    ratio: float | None
    phases: dict[str, float | None]
    tokens: dict[str, float | None]


def fates(results: Results, label: str) -> Fates | None:
    """Return what became of a method's buffered questions; `None` without replay, so without a
    buffer, and without finished runs.
    """
    records = _records(results, label)
    if not records or not results.has_replay(label):
        return None
    names = ("admitted", "graduated", "evicted", "graduated_visits", "evicted_visits")
    return Fates(*(_total(records, f"buffer/{name}/") for name in names))


def graduation_difference(results: Results, label: str, part: str) -> Estimate | None:
    """Return the fraction that graduated of the questions admitted with an accuracy, minus the
    baseline's, over the seeds that both have; `None` for the baseline and without buffers.

    Args:
        results: All runs.
        label: The method.
        part: Accuracy at admission in percent, as metrics name it.
    """
    labels = (label, results.plan.baseline)
    if label == results.plan.baseline or not all(map(results.has_replay, labels)):
        return None
    runs = [results.counted(each) for each in labels]
    counts = np.array(
        [
            [
                [_total([of_label[seed].record], f"buffer/{fate}/")[part] for fate in FATES]
                for seed in runs[0]
                if seed in runs[1]
            ]
            for of_label in runs
        ],
        dtype=np.float64,
    )
    if not counts.size or not counts[..., 1].sum(axis=1).all():
        return None
    sums = counts.sum(axis=1)
    ratios, draws = sums[:, 0] / sums[:, 1], bootstrap_ratios(counts)
    return interval(ratios[0] - ratios[1], draws[:, 0] - draws[:, 1])


def cost(results: Results, label: str) -> Cost | None:
    """Return what a method's steps take; `None` without finished runs."""
    records = _records(results, label)
    seconds = _median(_step_seconds(records))
    if seconds is None:
        return None
    base = _median(_step_seconds(_records(results, results.plan.baseline)))
    return Cost(
        seconds=seconds,
        ratio=seconds / base if base else None,
        phases={phase: _median(_values(records, f"seconds/{phase}")) for phase in PHASES},
        tokens={name: _per_step(records, metric) for name, metric in TOKENS},
    )


def final_means(results: Results, label: str) -> dict[str, float | None]:
    """Return the measurements of `FINAL`, averaged over the last steps of every finished run that
    have them, and then over runs.
    """
    records, means = _records(results, label), {}
    for name, metric in FINAL:
        of_runs = [
            _mean(_values([record], metric, record.metrics[-1]["step"])) for record in records
        ]
        means[name] = _mean([value for value in of_runs if value is not None])
    return means


def _records(results: Results, label: str) -> list[RunRecord]:
    return [result.record for result in results.counted(label).values() if result.record.metrics]


def _total(records: Iterable[RunRecord], prefix: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update({part: int(record.last(prefix + part) or 0) for part in record.names(prefix)})
    return counts


def _values(records: Iterable[RunRecord], metric: str, last_step: int | None = None) -> list[float]:
    """Return a metric's values in all steps, or in the last ones up to `last_step`."""
    first = 0 if last_step is None else last_step - NUM_FINAL_STEPS + 1
    return [
        row[metric]
        for record in records
        for row in record.metrics
        if row["step"] >= first and row.get(metric) is not None
    ]


def _per_step(records: Sequence[RunRecord], metric: str) -> float | None:
    """Return a count per step, where a step without it has none of it; `None` if no step has it."""
    values = _values(records, metric)
    return sum(values) / sum(len(record.metrics) for record in records) if values else None


def _step_seconds(records: Iterable[RunRecord]) -> list[float]:
    rows = [
        row for record in records for row in record.metrics if row.get("seconds/step") is not None
    ]
    return [row["seconds/step"] - (row.get("seconds/evaluation") or 0.0) for row in rows]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None

"""The tables of a comparison as text cells, for Markdown and for the page alike, and the same
numbers as rows for CSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zppo_mm.comparison.accuracy import MethodAccuracy
from zppo_mm.comparison.accuracy_tables import (
    Accuracies,
    accuracy_table,
    contrast_table,
    gain_table,
    num_counted,
    part_table,
)
from zppo_mm.comparison.cells import Table, difference, fraction, number
from zppo_mm.comparison.intervals import Estimate
from zppo_mm.comparison.measures import (
    FINAL,
    NUM_FINAL_STEPS,
    PHASES,
    TOKENS,
    Fates,
    cost,
    fates,
    final_means,
    graduation_difference,
)
from zppo_mm.comparison.results import Results

MANY_VISITS = 4
NEVER = "0"
"""Accuracy at admission, in percent, of questions that were not solved once."""


def tables(results: Results, by_part: Accuracies) -> list[Table]:
    """Return all tables for which there is something to show, without columns that no method has a
    value in.
    """
    made = [
        accuracy_table(results, by_part),
        gain_table(results, by_part),
        contrast_table(results),
        part_table(results, by_part),
        _graduations(results),
        _visits(results),
        _cost(results),
        _final(results),
    ]
    return [
        *(_without_empty_columns(table) for table in made if table is not None and table.rows),
        _runs(results),
    ]


def _graduations(results: Results) -> Table | None:
    found = {label: fates(results, label) for label in results.plan.labels}
    bins = sorted({part for each in found.values() if each for part in each.admitted}, key=float)
    if not bins:
        return None
    rows = []
    for label, each in found.items():
        if each is None:
            rows.append((label, *[""] * (len(bins) + 3)))
            continue
        fractions = [fraction(each.graduated[part], each.admitted[part]) for part in bins]
        gone = each.graduated.total() + each.evicted.total()
        rows.append(
            (
                label,
                *fractions,
                fraction(each.graduated.total(), each.admitted.total()),
                fraction(each.graduated.total(), gone),
                difference(graduation_difference(results, label, NEVER)),
            )
        )
    note = (
        "Hard questions that reached the threshold unaided, of those admitted to the replay buffer "
        "with this accuracy, over all seeds, and of those that left it. The last column is the "
        "difference to the baseline in points, with a 95 % interval of a bootstrap over seeds. "
        "Methods without replay have no buffer. The paper's 2B student: 28 % of those admitted at "
        "0 % with ZPPO, 4 % with GRPO and replay."
    )
    return Table(
        "Graduated, by accuracy at admission",
        note,
        (
            "method",
            *(f"at {part} %" for part in bins),
            "all",
            "of those that left",
            f"at {NEVER} %, to {results.plan.baseline}",
        ),
        tuple(rows),
    )


def _visits(results: Results) -> Table | None:
    rows = []
    for label in results.plan.labels:
        each = fates(results, label)
        if each is None:
            continue
        visits = [str(_visited(each, count)) for count in range(1, MANY_VISITS + 1)]
        rows.append(
            (
                label,
                str(each.admitted.total()),
                *visits,
                str(each.evicted.total()),
                str(each.num_left),
            )
        )
    names = [*(f"after {count}" for count in range(1, MANY_VISITS)), f"after {MANY_VISITS} or more"]
    header = (
        "method",
        "admitted",
        *(f"graduated {name}" for name in names),
        "evicted",
        "still there",
    )
    return Table(
        "Fates of buffered questions",
        "Graduations by the number of times a question was asked again.",
        header,
        tuple(rows),
    )


def _visited(each: Fates, count: int) -> int:
    return sum(
        number
        for visits, number in each.graduated_visits.items()
        if min(int(visits), MANY_VISITS) == count
    )


def _cost(results: Results) -> Table:
    rows = []
    for label in results.plan.labels:
        found = cost(results, label)
        if found is None:
            rows.append((label, *[""] * (2 + len(PHASES) + len(TOKENS))))
            continue
        seconds = [
            f"{found.seconds:.2f}",
            number(found.ratio, ".2f"),
            *(number(value, ".2f") for value in found.phases.values()),
        ]
        rows.append((label, *seconds, *(number(value, ",.0f") for value in found.tokens.values())))
    note = (
        "Median seconds of a step without evaluation, by phase, and mean tokens of a step, over "
        "all seeds. Seconds compare only where the runs had the machine alike."
    )
    phases = (phase.replace("_", " ") for phase in PHASES)
    header = (
        "method",
        "seconds",
        f"x {results.plan.baseline}",
        *phases,
        *(f"tokens {name}" for name, _ in TOKENS),
    )
    return Table("Cost of a step", note, header, tuple(rows))


def _final(results: Results) -> Table:
    rows = [
        (label, *(number(value, ".1%") for value in final_means(results, label).values()))
        for label in results.plan.labels
    ]
    note = (
        f"Training prompts of the last {NUM_FINAL_STEPS} steps, mean over seeds. A BCQ accuracy "
        "near 100 % would mean that the candidates give themselves away. tools/audit.py has more "
        "of this."
    )
    return Table(
        "Answers to reformulated prompts at the end",
        note,
        ("method", *(name for name, _ in FINAL)),
        tuple(rows),
    )


def _runs(results: Results) -> Table:
    rows = [(label, *(run.status for run in runs.values())) for label, runs in results.runs.items()]
    note = "Only finished runs are part of the tables."
    return Table(
        "Runs", note, ("method", *(f"seed {seed}" for seed in results.plan.seeds)), tuple(rows)
    )


def _without_empty_columns(table: Table) -> Table:
    kept = [index for index in range(len(table.header)) if any(row[index] for row in table.rows)]
    return replace(
        table,
        header=tuple(table.header[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
    )


def csv_rows(results: Results, by_part: Accuracies) -> list[dict[str, str | float | int | None]]:
    """Return one row per method, and per run of it, with every number unrounded; cells without a
    value are `None`.
    """
    rows = []
    for label in results.plan.labels:
        row: dict[str, str | float | int | None] = {
            "method": label,
            "seed": "all",
            "status": num_counted(results, label),
        }
        for index, (name, of_part) in enumerate(by_part.items()):
            row |= _accuracy_cells(name if index else "", of_part[label])
        each, spent = fates(results, label), cost(results, label)
        if each is not None:
            row |= {
                f"{fate}/{part}": count
                for fate in ("admitted", "graduated", "evicted")
                for part, count in getattr(each, fate).items()
            }
        if spent is not None:
            row |= {"seconds": spent.seconds, "seconds/ratio": spent.ratio}
            row |= {f"seconds/{name}": value for name, value in spent.phases.items()}
            row |= {f"tokens {name}": value for name, value in spent.tokens.items()}
        row |= final_means(results, label)
        rows.append(row)
        for seed, run in results.runs[label].items():
            first, last = (
                run.record.evaluations[i]["accuracy"] if run.record.evaluations else None
                for i in (0, -1)
            )
            rows.append(
                {
                    "method": label,
                    "seed": seed,
                    "status": run.status,
                    "before": first,
                    "after": last if run.counts else None,
                }
            )
    return rows


def _accuracy_cells(part: str, found: MethodAccuracy | None) -> dict[str, str | float | int | None]:
    if found is None:
        return {}
    suffix = f"/{part}" if part else ""
    cells: dict[str, str | float | int | None] = {
        f"questions{suffix}": found.num_questions,
        f"before{suffix}": found.before,
    }
    for name in ("after", "gain", "difference", "curve", "curve_difference"):
        estimate: Estimate | None = getattr(found, name)
        if estimate is not None:
            cells |= {
                f"{name}{suffix}": estimate.value,
                f"{name}_low{suffix}": estimate.low,
                f"{name}_high{suffix}": estimate.high,
            }
    return cells


def csv_header(rows: Sequence[dict[str, str | float | int | None]]) -> list[str]:
    """Return all columns in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))

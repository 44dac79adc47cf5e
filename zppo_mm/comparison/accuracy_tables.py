"""The tables of held-out accuracy: after training, gains, sums of methods, and by part of the
questions.
"""

from __future__ import annotations

from zppo_mm.comparison.accuracy import MethodAccuracy, contrast, method_accuracy, parts_of
from zppo_mm.comparison.cells import Table, difference, percent, with_interval
from zppo_mm.comparison.results import Results

Accuracies = dict[str, dict[str, MethodAccuracy | None]]
"""By name of the part of the held-out questions and by label; the first part is what methods are
compared by, all questions unless the plan names parts.
"""


def accuracies(results: Results) -> Accuracies:
    """Return every method's accuracy on every part of the held-out questions."""
    return {
        part.name: {label: method_accuracy(results, label, part) for label in results.plan.labels}
        for part in parts_of(results)
    }


def main_part(by_part: Accuracies) -> dict[str, MethodAccuracy | None]:
    """Return the accuracies of the first part."""
    return next(iter(by_part.values()))


def accuracy_table(results: Results, by_part: Accuracies) -> Table:
    """Return accuracies on the first part, and differences to the baseline."""
    baseline = results.plan.baseline
    rows = []
    for label in results.plan.labels:
        found = main_part(by_part)[label]
        if found is None:
            rows.append((label, num_counted(results, label), *[""] * 5))
            continue
        cells = (
            percent(found.before),
            with_interval(found.after),
            difference(found.difference),
        )
        rows.append(
            (
                label,
                num_counted(results, label),
                *cells,
                with_interval(found.curve),
                difference(found.curve_difference),
            )
        )
    unpaired = sum(found.num_unpaired for found in main_part(by_part).values() if found)
    note = (
        "Accuracy on the same held-out questions for all methods, in percent, with 95 % intervals "
        f"of a paired bootstrap over questions and seeds. Differences to {baseline} are in points; "
        "a bold one has an interval without 0. The mean of the curve is over all evaluations after "
        "step 0."
    )
    if unpaired:
        note += (
            f" {unpaired} answers are no part of a difference, because only one of the two methods "
            "has one."
        )
    header = (
        "method",
        "seeds",
        "before",
        "after",
        f"after, to {baseline}",
        "mean of the curve",
        f"mean, to {baseline}",
    )
    return Table("Held-out accuracy", note, header, tuple(rows))


def gain_table(results: Results, by_part: Accuracies) -> Table | None:
    """Return what every method gained on every part; `None` with one part."""
    names = list(by_part)
    if not names[1:]:
        return None
    first = [next((each for each in by_part[name].values() if each), None) for name in names]
    rows = [("before", *(percent(found.before) if found else "" for found in first))]
    for label in results.plan.labels:
        found = [by_part[name][label] for name in names]
        rows.append((label, *(difference(each.gain if each else None) for each in found)))
    return Table(
        "Gains over the student before training",
        "Accuracy after the last step minus that before training on the same questions, in "
        "points, with 95 % intervals; a bold one has an interval without 0. The first row is the "
        "accuracy before training, in percent.",
        ("method", *names),
        tuple(rows),
    )


def contrast_table(results: Results) -> Table | None:
    """Return the plan's sums of accuracies on every part."""
    parts = parts_of(results)
    rows = [
        (name, *(difference(contrast(results, factors, part)) for part in parts))
        for name, factors in results.plan.contrasts.items()
    ]
    written = "; ".join(
        f"{name}: " + " ".join(f"{factor:+g} {label}" for label, factor in factors.items())
        for name, factors in results.plan.contrasts.items()
    )
    return Table(
        "Contrasts",
        f"Sums of accuracies after the last step, in points, as above. {written}.",
        ("contrast", *(part.name for part in parts)),
        tuple(rows),
    )


def part_table(results: Results, by_part: Accuracies) -> Table | None:
    """Return the accuracy of every method on every part but the first; `None` without any."""
    names = list(by_part)[1:]
    if not names:
        return None
    header = ["method"]
    for name in names:
        header += [f"{name}, after", f"to {results.plan.baseline}"]
    rows = []
    for label in results.plan.labels:
        row = [label]
        for name in names:
            found = by_part[name][label]
            row += [with_interval(found.after), difference(found.difference)] if found else ["", ""]
        rows.append(tuple(row))
    return Table(
        "By modality and source", "After the last step, as above.", tuple(header), tuple(rows)
    )


def num_counted(results: Results, label: str) -> str:
    """Return how many seeds of a method are part of the tables."""
    return f"{len(results.counted(label))} of {len(results.plan.seeds)}"

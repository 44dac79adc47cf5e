"""The figures of a comparison, in the style of a run's report; every method keeps its color, and
dashes mean that it has no replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from zppo_mm.comparison.accuracy import parts_of
from zppo_mm.comparison.accuracy_tables import Accuracies, main_part
from zppo_mm.comparison.measures import PHASES, Fates, cost, fates
from zppo_mm.comparison.results import Results, RunResult
from zppo_mm.methods import METHODS
from zppo_mm.report.drawing import STYLE, DrawnFigure, finish_axes, smoothed, svg_uri
from zppo_mm.report.figures import GREY, SEQUENCE
from zppo_mm.report.run_record import Series

WIDTH_INCHES = 6.4
PNG_DPI = 150


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How a method is drawn, and what the figures call it."""

    name: str
    color: str
    linestyle: str


def draw_figures(results: Results, by_part: Accuracies, folder: Path) -> list[DrawnFigure]:
    """Draw every figure for which there are numbers, and write each as PNG and SVG into a
    folder.
    """
    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, title, caption, draw in FIGURES:
        with matplotlib.rc_context(STYLE):
            # A long list of methods needs room of its own, in the legend or on an axis.
            figure = Figure(
                figsize=(WIDTH_INCHES, 2.8 + 0.2 * len(results.plan.labels)), layout="constrained"
            )
            if draw(results, by_part, figure.add_subplot()):
                for suffix in ("png", "svg"):
                    figure.savefig(
                        folder / f"{name}.{suffix}",
                        dpi=PNG_DPI,
                        metadata={"Date": None} if suffix == "svg" else None,
                    )
                drawn.append(DrawnFigure(title, caption, svg_uri(figure)))
    return drawn


def styles_of(results: Results) -> dict[str, LineStyle]:
    """Return a style for every label: that of its method, with a color of its own where several
    labels have the same method.
    """
    methods = {label: METHODS[results.config(label).method] for label in results.plan.labels}
    named = {label: method for label, method in methods.items() if label == method.name}
    colors = {label: method.color for label, method in named.items()}
    palette = dict.fromkeys(method.color for method in METHODS.values())
    for label, method in methods.items():
        free = [color for color in (method.color, *palette) if color not in colors.values()]
        colors.setdefault(label, free[0] if free else method.color)
    return {
        label: LineStyle(
            name=method.label if label in named else label,
            color=colors[label],
            linestyle="-" if results.has_replay(label) else "--",
        )
        for label, method in methods.items()
    }


def _held_out(results: Results, by_part: Accuracies, axes: Axes) -> bool:
    has = parts_of(results)[0].has

    def series(run: RunResult) -> Series:
        points = {
            step: [each.accuracy for each in answers.values() if has(each)]
            for step, answers in sorted(run.answers.items())
        }
        points = {step: values for step, values in points.items() if values}
        return list(points), [float(np.mean(values)) for values in points.values()]

    return _curves(results, axes, series)


def _plain(results: Results, by_part: Accuracies, axes: Axes) -> bool:
    def series(run: RunResult) -> Series:
        steps, values = run.record.series("accuracy/plain")
        return steps, smoothed(values)

    return _curves(results, axes, series)


def _curves(results: Results, axes: Axes, series: Callable[[RunResult], Series]) -> bool:
    """Draw the mean over seeds of every method, and the range over seeds behind it."""
    drawn = False
    for label, style in styles_of(results).items():
        points = _by_step(series(run) for run in results.runs[label].values())
        if not points:
            continue
        steps, means = list(points), [float(np.mean(values)) for values in points.values()]
        axes.plot(
            steps,
            means,
            color=style.color,
            linestyle=style.linestyle,
            label=style.name,
            marker="o" if len(steps) < 15 else "",
            markersize=3.5,
        )
        lows, highs = (
            [min(values) for values in points.values()],
            [max(values) for values in points.values()],
        )
        axes.fill_between(steps, lows, highs, color=style.color, alpha=0.1, linewidth=0)
        drawn = True
    finish_axes(axes, "accuracy", percent=True)
    return drawn


def _by_step(curves: Iterable[Series]) -> dict[int, list[float]]:
    """Return the values of all seeds by step, ascending."""
    points: dict[int, list[float]] = {}
    for steps, values in curves:
        for step, value in zip(steps, values, strict=True):
            points.setdefault(step, []).append(value)
    return dict(sorted(points.items()))


def _differences(results: Results, by_part: Accuracies, axes: Axes) -> bool:
    found = {
        label: each
        for label, each in main_part(by_part).items()
        if each is not None and each.difference and each.curve_difference
    }
    styles = styles_of(results)
    for index, (label, each) in enumerate(found.items()):
        assert each.difference is not None
        assert each.curve_difference is not None
        for shift, estimate, alpha in (
            (-0.13, each.difference, 1.0),
            (0.13, each.curve_difference, 0.45),
        ):
            axes.plot(
                [estimate.low, estimate.high],
                [index + shift] * 2,
                color=styles[label].color,
                alpha=alpha,
                solid_capstyle="butt",
            )
            axes.plot(
                [estimate.value],
                [index + shift],
                color=styles[label].color,
                alpha=alpha,
                marker="o",
                markersize=5,
            )
    axes.axvline(0, color=GREY, linewidth=1)
    finish_axes(axes, "")
    axes.set_yticks(range(len(found)), [styles[label].name for label in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.set_xlabel(f"points of held-out accuracy to {results.plan.baseline}")
    axes.grid(axis="y", visible=False)
    return bool(found)


def _graduated(results: Results, by_part: Accuracies, axes: Axes) -> bool:
    found = {
        label: each
        for label in results.plan.labels
        if (each := fates(results, label)) is not None and each.admitted
    }
    bins = sorted({part for each in found.values() for part in each.admitted}, key=float)
    styles, width = styles_of(results), 0.8 / max(len(found), 1)
    for index, (label, each) in enumerate(found.items()):
        fractions = [
            each.graduated[part] / each.admitted[part] if each.admitted[part] else 0.0
            for part in bins
        ]
        positions = np.arange(len(bins)) + (index - (len(found) - 1) / 2) * width
        axes.bar(
            positions,
            fractions,
            width=0.9 * width,
            color=styles[label].color,
            label=styles[label].name,
        )
    finish_axes(axes, "graduated", percent=True)
    axes.set_xticks(range(len(bins)), [f"{part} %" for part in bins])
    axes.set_xlabel("accuracy at admission")
    axes.grid(axis="x", visible=False)
    return bool(found)


def _fates(results: Results, by_part: Accuracies, axes: Axes) -> bool:
    found = {
        label: each
        for label in results.plan.labels
        if (each := fates(results, label)) is not None and each.admitted
    }
    left = np.zeros(len(found))
    fractions: dict[str, Callable[[Fates], int]] = {
        "graduated": lambda each: each.graduated.total(),
        "evicted": lambda each: each.evicted.total(),
        "still there": lambda each: each.num_left,
    }
    for (name, count), color in zip(fractions.items(), SEQUENCE, strict=False):
        widths = np.array([count(each) / each.admitted.total() for each in found.values()])
        axes.barh(range(len(found)), widths, left=left, height=0.6, color=color, label=name)
        left += widths
    finish_axes(axes, "", columns=3)
    styles = styles_of(results)
    axes.set_yticks(
        range(len(found)),
        [f"{styles[label].name} ({each.admitted.total():,})" for label, each in found.items()],
    )
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("of the questions admitted to the buffer (their number)")
    axes.grid(axis="y", visible=False)
    return bool(found)


def _seconds(results: Results, by_part: Accuracies, axes: Axes) -> bool:
    found = {
        label: each for label in results.plan.labels if (each := cost(results, label)) is not None
    }
    left = np.zeros(len(found))
    for phase, color in zip(PHASES, SEQUENCE, strict=False):
        widths = np.array([each.phases[phase] or 0.0 for each in found.values()])
        if widths.any():
            axes.barh(
                range(len(found)),
                widths,
                left=left,
                height=0.6,
                color=color,
                label=phase.replace("_", " "),
            )
        left += widths
    for index, each in enumerate(found.values()):
        text = f" {each.seconds:.1f} s" + (f", {each.ratio:.2f} x" if each.ratio else "")
        axes.text(left[index], index, text, va="center", fontsize=8, color="#4b5563")
    finish_axes(axes, "", columns=3)
    styles = styles_of(results)
    axes.set_yticks(range(len(found)), [styles[label].name for label in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(right=1.25 * max(left, default=1.0) or 1.0)
    axes.set_xlabel("seconds of a step")
    axes.grid(axis="y", visible=False)
    return bool(found)


Draw = Callable[[Results, Accuracies, Axes], bool]

FIGURES: Sequence[tuple[str, str, str, Draw]] = (
    (
        "held_out",
        "Held-out accuracy",
        "Mean over seeds, and their range behind it. Dashed: without replay. Runs that are not "
        "finished are drawn as far as they came.",
        _held_out,
    ),
    (
        "differences",
        "Differences to the baseline",
        "Strong: after the last step. Pale: mean of the curve. With 95 % intervals, paired by seed "
        "and question.",
        _differences,
    ),
    (
        "plain",
        "Plain accuracy in training",
        "Rollouts of plain prompts, new and replayed, averaged over the last five steps. Replay "
        "makes them harder.",
        _plain,
    ),
    (
        "graduated",
        "Graduated, by accuracy at admission",
        "Fraction of the questions admitted to the replay buffer, over all seeds.",
        _graduated,
    ),
    (
        "fates",
        "Fates of buffered questions",
        "What became of the hard questions admitted to the replay buffer, over all seeds. Evicted: "
        "pushed out of a full buffer by newer ones.",
        _fates,
    ),
    (
        "seconds",
        "Time of a step",
        "Medians by phase, and the whole step as a multiple of the baseline's.",
        _seconds,
    ),
)
"""File name, title, caption and drawing of every figure."""

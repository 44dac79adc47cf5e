"""What all figures share: their style, curves and stacked bars, and the way into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from zppo_mm.report.run_record import RunRecord, Series

SMOOTHING_STEPS = 5
# The keys are names of matplotlib settings, which its stubs list one by one.
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4cad4",
    "axes.labelcolor": "#4b5563",
    "axes.grid": True,
    "grid.color": "#e8ebf0",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 2.0,
    "svg.hashsalt": "zppo_mm",
}


@dataclass(frozen=True, slots=True)
class DrawnFigure:
    """One figure of the report.

    Attributes:
        title: Its heading.
        caption: What it shows and how to read it.
        source: Data URI of the SVG.
    """

    title: str
    caption: str
    source: str


def svg_uri(figure: Figure) -> str:
    """Return a figure as a data URI that is the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def smoothed(values: Sequence[float]) -> list[float]:
    """Average every value with those before it in a short window."""
    return [
        float(np.mean(values[max(0, i + 1 - SMOOTHING_STEPS) : i + 1])) for i in range(len(values))
    ]


def draw_curve(axes: Axes, series: Series, label: str, color: str, smooth: bool = True) -> bool:
    """Draw one curve: faint as measured, strong as moving average; points where there are few."""
    steps, values = series
    if not steps:
        return False
    if smooth and len(steps) > 2 * SMOOTHING_STEPS:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1.0)
        axes.plot(steps, smoothed(values), color=color, label=label)
    else:
        axes.plot(steps, values, color=color, label=label, marker="o", markersize=4)
    return True


def finish_axes(axes: Axes, ylabel: str, percent: bool = False, columns: int = 4) -> None:
    """Label the axes and put the legend above the plot."""
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, max(0.05, *(axes.get_ylim()[1:])))
        axes.set_ylim(top=min(1.02, axes.get_ylim()[1]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=columns,
            borderaxespad=0.2,
            handlelength=1.4,
            columnspacing=1.4,
        )


def curves(
    ylabel: str, percent: bool, *metrics: tuple[str, str, str]
) -> Callable[[RunRecord, Axes], bool]:
    """Return a drawing of several metrics as curves: `(metric, label, color)` each."""

    def draw(run: RunRecord, axes: Axes) -> bool:
        drawn = [
            draw_curve(axes, run.series(metric), label, color) for metric, label, color in metrics
        ]
        finish_axes(axes, ylabel, percent)
        return any(drawn)

    return draw


def draw_stack(
    axes: Axes, run: RunRecord, metrics: Sequence[str], labels: Sequence[str], colors: Sequence[str]
) -> bool:
    """Draw metrics as bars on top of each other, one bar per row."""
    steps = [row["step"] for row in run.metrics]
    # A bar may stand for several steps.
    width = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 0.4
    bottom = np.zeros(len(steps))
    for metric, label, color in zip(metrics, labels, colors, strict=True):
        heights = np.array([row.get(metric) or 0.0 for row in run.metrics])
        if heights.any():
            axes.bar(
                steps,
                heights,
                bottom=bottom,
                width=width,
                label=label,
                color=color,
                edgecolor="white",
                linewidth=0.3,
            )
        bottom += heights
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    return bool(bottom.any())


def ramp(count: int) -> list[str]:
    """Return colors from dark (hardest) to light."""
    colormap = matplotlib.colormaps["Blues_r"]
    return [
        matplotlib.colors.to_hex(colormap(0.1 + 0.65 * index / max(count - 1, 1)))
        for index in range(count)
    ]

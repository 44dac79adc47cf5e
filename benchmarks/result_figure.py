"""Draw docs/result.png from the table "Every method" of docs/experiments.md: `python
benchmarks/result_figure.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "experiments.md", ROOT / "docs" / "result.png"
BEFORE = 20.7
"""Accuracy in percent before training, the same for all methods."""
SHOWN = {
    "grpo": "GRPO",
    "grpo_replay": "GRPO with replay",
    "prefix_replay": "teacher prefix",
    "hint_replay": "teacher hint",
    "bcq_replay": "BCQ alone",
    "ncq_replay": "NCQ alone",
    "zppo": "ZPPO (BCQ and NCQ)",
    "off_distill_replay": "off-policy distillation",
    "inject_replay": "injected teacher rollouts",
    "on_distill_replay": "on-policy distillation",
}
"""Rows of the figure, from the top; where a method exists with and without replay, with it."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Held-out accuracy after the last step with its 95 % interval, in percent."""

    mean: float
    low: float
    high: float


def read_table(text: str) -> dict[str, Accuracy]:
    """Return the second column of the table by method."""
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \|", text, re.MULTILINE)
    return {method: Accuracy(*map(float, numbers)) for method, *numbers in rows}


def draw(results: dict[str, Accuracy]) -> Figure:
    """Return a row per method: a dot at the mean, a line over the interval."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for row, method in enumerate(SHOWN):
        result, color = results[method], "#c1432b" if method == "zppo" else "#3b5b7a"
        axes.plot([result.low, result.high], [row, row], color=color, linewidth=2, alpha=0.5)
        axes.plot(result.mean, row, "o", color=color, markersize=7)
        axes.annotate(
            f"{result.mean:.0f}", (result.mean, row), (0, 5), textcoords="offset points",
            ha="center", fontsize=8, color=color,
        )  # fmt: skip
    axes.axvline(BEFORE, color="#888888", linestyle=":", linewidth=1)
    axes.annotate(
        "before", (BEFORE, -0.75), (-3, 0), textcoords="offset points", ha="right", fontsize=8
    )
    axes.set(xlim=(0, 100), ylim=(len(SHOWN) - 0.5, -1.1))
    axes.set_yticks(range(len(SHOWN)), SHOWN.values(), fontsize=9)
    axes.get_yticklabels()[list(SHOWN).index("zppo")].set_fontweight("bold")
    axes.set_xlabel("held-out accuracy after 60 steps, %, with 95 % interval", fontsize=9)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    return figure


def main() -> None:
    """Read the page and write the picture."""
    draw(read_table(PAGE.read_text(encoding="utf-8"))).savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()

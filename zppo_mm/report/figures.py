"""The report's figures, drawn by matplotlib as inline SVG."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zppo_mm.methods import KINDS, REFORMULATED
from zppo_mm.report.drawing import (
    STYLE,
    DrawnFigure,
    curves,
    draw_curve,
    draw_stack,
    finish_axes,
    ramp,
    svg_uri,
)
from zppo_mm.report.run_record import RunRecord

KIND_COLORS = {kind.name: kind.color for kind in KINDS}
PLAIN, BCQ, NCQ = (KIND_COLORS[kind] for kind in ("new", "bcq", "ncq"))
HELD_OUT, GREY, EASY, HARD = "#7b4fb3", "#8a94a6", "#cbd8ea", "#d9655b"
SEQUENCE = (
    "#23395d",
    "#3b6fb6",
    "#7fa6d9",
    "#c3d6ef",
    "#e08a2c",
    "#f0bd84",
    "#1f9d78",
    "#8accb4",
    "#7b4fb3",
    "#b79cd8",
)
SOURCE_COLORS = ("#5b8fd0", "#45b894", "#e6a860", "#d9655b", "#8a94a6")
SIZE_INCHES = (6.4, 3.0)


def draw_figures(run: RunRecord) -> list[DrawnFigure]:
    """Draw every figure for which the run has data, in the report's order."""
    drawn = []
    for title, caption, draw in FIGURES:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=SIZE_INCHES, layout="constrained")
            axes = figure.add_subplot()
            if draw(run, axes):
                drawn.append(DrawnFigure(title, caption, svg_uri(figure)))
    return drawn


def _held_out(run: RunRecord, axes: Axes) -> bool:
    rows = run.evaluations
    sources = sorted({source for row in rows for source in row.get("accuracy_by_source", {})})
    if len(sources) > 1:
        for source, color in zip(sources, SOURCE_COLORS * len(sources), strict=False):
            points = [
                (row["step"], row["accuracy_by_source"][source])
                for row in rows
                if source in row.get("accuracy_by_source", {})
            ]
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linewidth=1.1,
                alpha=0.8,
                marker="o",
                markersize=2.5,
                label=source or "without source",
            )
    drawn = draw_curve(
        axes,
        ([row["step"] for row in rows], [row["accuracy"] for row in rows]),
        "all held-out",
        HELD_OUT,
        smooth=False,
    )
    finish_axes(axes, "accuracy", percent=True)
    return drawn


def _composition(run: RunRecord, axes: Axes) -> bool:
    drawn = draw_stack(axes, run, ("batch/easy", "batch/hard"), ("easy", "hard"), (EASY, "#e9a49d"))
    draw_curve(axes, run.series("batch/bcq_eligible"), "BCQ-eligible", BCQ)
    draw_curve(axes, run.series("batch/ncq_eligible"), "NCQ-eligible", NCQ)
    finish_axes(axes, "plain questions")
    return drawn


def _groups(run: RunRecord, axes: Axes) -> bool:
    drawn = draw_stack(
        axes,
        run,
        [f"batch/groups/{kind.name}" for kind in KINDS],
        [kind.label for kind in KINDS],
        [kind.color for kind in KINDS],
    )
    finish_axes(axes, "groups")
    return drawn


def _occupancy(run: RunRecord, axes: Axes) -> bool:
    bins = run.names("buffer/occupancy/")
    drawn = draw_stack(
        axes,
        run,
        [f"buffer/occupancy/{part}" for part in bins],
        [f"{part} %" for part in bins],
        ramp(len(bins)),
    )
    finish_axes(axes, "questions in the buffer", columns=8)
    return drawn


def _fates(run: RunRecord, axes: Axes) -> bool:
    bins = run.names("buffer/admitted/")
    bottom = np.zeros(len(bins))
    admitted = np.array([run.last(f"buffer/admitted/{part}") or 0.0 for part in bins])
    if not admitted.any():
        return False
    gone = np.zeros(len(bins))
    for fate, color in (("graduated", BCQ), ("evicted", HARD)):
        counts = np.array([run.last(f"buffer/{fate}/{part}") or 0.0 for part in bins])
        axes.bar(range(len(bins)), counts, bottom=bottom, label=fate, color=color, width=0.6)
        bottom, gone = bottom + counts, gone + counts
        if fate == "graduated":
            fractions = counts / np.maximum(admitted, 1)
    # A question may be admitted again after it left, so what is still there is what remains of the
    # admissions.
    axes.bar(
        range(len(bins)),
        admitted - gone,
        bottom=bottom,
        label="still in the buffer",
        color="#d5dce6",
        width=0.6,
    )
    for index, (total, fraction) in enumerate(zip(admitted, fractions, strict=True)):
        axes.text(
            index,
            total,
            f"{fraction:.0%} graduated",
            ha="center",
            va="bottom",
            fontsize=8,
            color="#4b5563",
        )
    finish_axes(axes, "admissions")
    axes.set_xticks(range(len(bins)), [f"{part} %" for part in bins])
    axes.set_xlabel("accuracy at admission")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    return True


def _phases(run: RunRecord, axes: Axes) -> bool:
    known = (
        "data",
        "plain_rollout",
        "teacher",
        "reformulated_rollout",
        "old_logprobs",
        "update",
        "evaluation",
        "checkpoint",
    )
    present = [name for name in run.names("seconds/") if name != "step"]
    names = [name for name in known if name in present] + [
        name for name in present if name not in known
    ]
    colors = (SEQUENCE * (len(names) // len(SEQUENCE) + 1))[: len(names)]
    drawn = draw_stack(
        axes,
        run,
        [f"seconds/{name}" for name in names],
        [name.replace("_", " ") for name in names],
        colors,
    )
    answered = run.series("teacher/answer_seconds")
    if answered[0]:
        axes.plot(
            *answered, color="black", linewidth=1.2, linestyle="--", label="asked to answered"
        )
    finish_axes(axes, "seconds per step", columns=5)
    return drawn


def _memory(run: RunRecord, axes: Axes) -> bool:
    steps, values = run.series("system/rss_bytes")
    drawn = draw_curve(
        axes,
        (steps, [value / 2**30 for value in values]),
        "largest process, now",
        GREY,
        smooth=False,
    )
    finish_axes(axes, "GiB")
    axes.set_ylim(0, 1.2 * max(values, default=0.0) / 2**30 or 1.0)
    return drawn


def _by_kind(metric: str) -> list[tuple[str, str, str]]:
    """Return the curves of a metric for plain prompts and every kind of reformulated ones."""
    plain = (f"{metric}/plain", "plain", PLAIN)
    return [plain, *((f"{metric}/{each.name}", each.label, each.color) for each in REFORMULATED)]


FIGURES: tuple[tuple[str, str, Callable[[RunRecord, Axes], bool]], ...] = (
    (
        "Training accuracy by kind of prompt",
        "Mean reward of the student's rollouts. Reformulated prompts come from hard questions "
        "only, so their curves lie on harder ground.",
        curves(
            "accuracy",
            True,
            *_by_kind("accuracy"),
        ),
    ),
    (
        "Held-out accuracy",
        "The same questions every time, plain prompts; none of them is trained on.",
        _held_out,
    ),
    (
        "Batch composition before the cap",
        "Plain questions of each step, and how many of the hard ones could become BCQ or NCQ "
        "prompts.",
        _composition,
    ),
    ("Groups trained on", "What each step's updates were made of, after the cap.", _groups),
    (
        "Replay buffer by accuracy at admission",
        "Questions in the buffer after each step; dark ones were never solved when they were "
        "admitted.",
        _occupancy,
    ),
    ("Fates by accuracy at admission", "What became of all questions admitted so far.", _fates),
    (
        "Teacher on what it was asked",
        "Questions with at least one correct teacher rollout, and the mean over all: hard ones "
        "(with hint and prefix those that the pre-cap keeps), or all in distillation on its text.",
        curves(
            "fraction",
            True,
            ("teacher/solved", "questions solved", NCQ),
            ("teacher/accuracy", "rollouts correct", GREY),
        ),
    ),
    (
        "Match audit",
        "How often an answer repeats what a candidate said. A BCQ curve near 100 % would mean that "
        "candidates give themselves away.",
        curves(
            "fraction of rollouts",
            True,
            ("audit/bcq_right", "BCQ: right candidate", BCQ),
            ("audit/bcq_wrong", "BCQ: wrong candidate", "#d9655b"),
            ("audit/ncq_listed", "NCQ: listed as wrong", NCQ),
        ),
    ),
    (
        "Loss",
        "Clipped surrogate, or divergence from the teacher's distribution, averaged over the "
        "step's updates.",
        curves("loss", False, ("policy/loss", "loss", PLAIN)),
    ),
    (
        "Entropy",
        "Of the policy, per response token.",
        curves("nats", False, ("policy/entropy", "entropy", PLAIN)),
    ),
    (
        "Clipped tokens",
        "Fraction of response tokens whose ratio was clipped.",
        curves(
            "fraction",
            True,
            ("policy/clip_low", "low", PLAIN),
            ("policy/clip_high", "high", NCQ),
            ("policy/clip_dual", "dual clip", "#d9655b"),
        ),
    ),
    (
        "Gradient norm",
        "Before clipping, averaged over the step's updates.",
        curves("norm", False, ("policy/grad_norm", "gradient norm", PLAIN)),
    ),
    (
        "Response length",
        "Mean tokens of a response by kind of prompt.",
        curves(
            "tokens",
            False,
            *_by_kind("response/tokens"),
        ),
    ),
    (
        "Truncated responses",
        "Fraction of responses that reached the length limit.",
        curves("fraction", True, ("response/truncated", "truncated", PLAIN)),
    ),
    (
        "Time by phase",
        "Where the seconds of each step went. Dashed: from asking the teacher to its last answer; "
        "with a teacher that runs elsewhere, what is longer than the step's own teacher phase "
        "passed while the student sampled.",
        _phases,
    ),
    ("Memory", "Resident memory, which must not grow with the steps.", _memory),
)
"""Title, caption and drawing of every figure."""

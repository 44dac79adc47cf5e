"""report.html: one self-contained page about a run, made from its metrics, evaluations, transcripts
and buffer files alone.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import jinja2

from data.atomic_files import write_atomically
from zppo_mm.report.examples import MediaOpener, choose_examples
from zppo_mm.report.figures import draw_figures
from zppo_mm.report.run_record import RunRecord, read_run
from zppo_mm.run_folder import RunFolder

logger = logging.getLogger(__name__)

TEMPLATES_FOLDER = Path(__file__).parent
TEMPLATE_FILE = "page.html.jinja"
MAX_POINTS = 200
"""Most steps in a figure; a figure is about 600 pixels wide."""


@dataclass(frozen=True, slots=True)
class Headline:
    """One number at the top of the page."""

    label: str
    value: str
    note: str


def write_report(
    run_folder: Path, open_media: MediaOpener | None = None, num_examples: int = 4
) -> Path:
    """Write `report.html` into a run's folder and return its path. It is written
    atomically, so that it can be made while the run goes on.

    Args:
        run_folder: A run's folder; every file in it may be missing, and the page shows what is
            there.
        open_media: Opens a media reference to `[frames, height, width, 3]` RGB; `None` shows no
            media.
        num_examples: Questions shown with their prompts and answers.
    """
    run = read_run(run_folder)
    page = (
        page_environment(TEMPLATES_FOLDER)
        .get_template(TEMPLATE_FILE)
        .render(
            name=run_folder.resolve().name,
            facts=_facts(run),
            headlines=_headlines(run),
            figures=draw_figures(run.thinned(MAX_POINTS)),
            examples=choose_examples(run_folder, num_examples, open_media),
        )
    )
    path = write_page(RunFolder(run_folder).report, page)
    logger.info("report: %s", path)
    return path


def page_environment(*folders: Path) -> jinja2.Environment:
    """Return the settings of all pages; templates are found in the folders, in their order."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: Path, page: str) -> Path:
    """Write a page; characters that UTF-8 does not have become question marks."""
    return write_atomically(path, page.encode("utf-8", errors="replace"))


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return what was run, as far as the folder knows it."""
    facts = [("steps", str(run.metrics[-1]["step"]) if run.metrics else "0")]
    for label, key in (
        ("method", "method"),
        ("questions", "modality"),
        ("student", "model.student"),
        ("teacher", "teacher.model"),
        ("new questions per step", "train.num_new_questions"),
        ("rollouts per prompt", "rollout.num_rollouts"),
        ("updates per step", "train.updates_per_step"),
        ("learning rate", "train.lr"),
        ("seed", "seed"),
    ):
        value = run.option(key)
        if value is not None:
            facts.append((label, str(value) or "bundled tiny model"))
    return [*facts, *run.described_changes()]


def _headlines(run: RunRecord) -> list[Headline]:
    """Return the numbers at the top of the page."""
    headlines = [*_held_out_headline(run), *_training_headline(run)]
    admitted, graduated = (_total(run, f"buffer/{fate}/") for fate in ("admitted", "graduated"))
    if admitted:
        headlines.append(
            Headline(
                "Hard questions mastered",
                _percent(graduated / admitted),
                f"{graduated:.0f} of {admitted:.0f} admissions graduated",
            )
        )
    steps, seconds = run.series("seconds/step")
    if steps:
        headlines.append(
            Headline(
                "Time",
                _duration(sum(seconds)),
                f"{sum(seconds) / len(seconds):.1f} s per step, {len(steps)} steps",
            )
        )
    return headlines


def _held_out_headline(run: RunRecord) -> list[Headline]:
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    questions = last.get("num_questions") or 0
    note = f"{questions} questions"
    if questions:
        error = math.sqrt(last["accuracy"] * (1 - last["accuracy"]) / questions)
        half_width = NormalDist().inv_cdf(0.975) * error
        note += f", ± {100 * half_width:.1f} points at 95 %"
    if len(run.evaluations) == 1:
        return [
            Headline(
                "Held-out accuracy", _percent(first["accuracy"]), f"step {first['step']}, {note}"
            )
        ]
    gain = 100 * (last["accuracy"] - first["accuracy"])
    value = f"{_percent(first['accuracy'])} → {_percent(last['accuracy'])}"
    return [Headline("Held-out accuracy, before and after", value, f"{gain:+.1f} points; {note}")]


def _training_headline(run: RunRecord) -> list[Headline]:
    steps, values = run.series("accuracy/new")
    if not steps:
        return []
    window = max(1, min(5, len(values) // 2))
    before, after = sum(values[:window]) / window, sum(values[-window:]) / window
    return [
        Headline(
            "New questions in training",
            f"{_percent(before)} → {_percent(after)}",
            f"mean of the first and last {window} steps",
        )
    ]


def _total(run: RunRecord, prefix: str) -> float:
    return sum(run.last(prefix + part) or 0.0 for part in run.names(prefix))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

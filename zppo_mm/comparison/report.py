"""comparison.md, comparison.csv and comparison.html: what the runs of a comparison say together."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape

from data.atomic_files import write_atomically
from zppo_mm.comparison.accuracy_tables import Accuracies, accuracies, main_part
from zppo_mm.comparison.cells import Table, markdown
from zppo_mm.comparison.figures import draw_figures
from zppo_mm.comparison.launch import Failure
from zppo_mm.comparison.measures import fates
from zppo_mm.comparison.plan import Plan
from zppo_mm.comparison.results import Results, read_results
from zppo_mm.comparison.tables import csv_header, csv_rows, tables
from zppo_mm.report.page import TEMPLATES_FOLDER, Headline, page_environment, write_page

MARKDOWN_FILE, CSV_FILE, PAGE_FILE = "comparison.md", "comparison.csv", "comparison.html"
FIGURES_FOLDER = "figures"
TEMPLATE_FILE = "comparison.html.jinja"


def write_comparison(plan: Plan, failures: Sequence[Failure] = ()) -> list[Table]:
    """Write all three files and the figures into the comparison's folder; whatever runs there are,
    finished or not.

    Args:
        plan: The comparison.
        failures: Runs that failed just now; the end of their output is shown.

    Returns:
        The tables, as in the files.
    """
    results = read_results(plan)
    by_part = accuracies(results)
    made = tables(results, by_part)
    plan.folder.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(results, by_part, plan.folder / FIGURES_FOLDER)
    environment = page_environment(Path(__file__).parent, TEMPLATES_FOLDER)
    environment.filters["bold"] = _bold
    page = environment.get_template(TEMPLATE_FILE).render(
        name=plan.folder.resolve().name,
        baseline=plan.baseline,
        facts=_facts(results),
        headlines=_headlines(results, by_part),
        figures=figures,
        tables=made,
    )
    write_page(plan.folder / PAGE_FILE, page)
    write_atomically(plan.folder / MARKDOWN_FILE, _document(plan, made, failures))
    write_atomically(plan.folder / CSV_FILE, _csv(results, by_part))
    return made


def _document(plan: Plan, made: Sequence[Table], failures: Sequence[Failure]) -> str:
    parts = [f"# Comparison: {plan.folder.resolve().name}"]
    for table in made:
        parts += [f"## {table.title}", table.note, markdown(table)]
    for failure in failures:
        parts += [f"## Failed: {failure.run.name}", f"```\n{failure.reason}\n```"]
    return "\n\n".join(parts) + "\n"


def _csv(results: Results, by_part: Accuracies) -> str:
    rows, text = csv_rows(results, by_part), io.StringIO()
    writer = csv.DictWriter(text, csv_header(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _facts(results: Results) -> list[tuple[str, str]]:
    """Return what all runs have alike."""
    plan = results.plan
    counted = sum(len(results.counted(label)) for label in plan.labels)
    facts = [
        ("methods", str(len(plan.labels))),
        ("seeds", str(len(plan.seeds))),
        ("finished runs", f"{counted} of {len(plan.runs)}"),
    ]
    for label, values in (
        ("questions", {run.config.modality for run in plan.runs}),
        ("steps", {run.config.train.train_iters for run in plan.runs}),
        ("new questions per step", {run.config.train.num_new_questions for run in plan.runs}),
        ("rollouts per prompt", {run.config.rollout.num_rollouts for run in plan.runs}),
        ("learning rate", {run.config.train.lr for run in plan.runs}),
        ("student", {run.config.model.student for run in plan.runs}),
    ):
        if len(values) == 1:
            facts.append((label, str(values.pop()) or "bundled tiny model"))
    return facts


def _headlines(results: Results, by_part: Accuracies) -> list[Headline]:
    """Return the numbers at the top: the best method after the last step, the baseline, and who
    masters what it never solved.
    """
    found = {label: each for label, each in main_part(by_part).items() if each is not None}
    best = max(found, key=lambda label: found[label].after.value, default=None)
    headlines = []
    for title, label in (("Best after the last step", best), ("Baseline", results.plan.baseline)):
        each = found.get(label or "")
        if each is not None:
            low, high = 100 * each.after.low, 100 * each.after.high
            note = (
                f"{100 * each.before:.1f} % before; 95 % interval {low:.1f} to {high:.1f} %, "
                f"seeds: {len(each.seeds)}"
            )
            headlines.append(Headline(title, f"{label} {100 * each.after.value:.1f} %", note))
    buffered = {
        label: fate
        for label in found
        if (fate := fates(results, label)) is not None and fate.admitted["0"]
    }
    if buffered:
        label, most = max(
            buffered.items(), key=lambda item: item[1].graduated["0"] / item[1].admitted["0"]
        )
        graduated, admitted = most.graduated["0"], most.admitted["0"]
        note = f"{graduated} of {admitted} questions admitted at 0 % graduated"
        headlines.append(
            Headline(
                "Most mastered of what was never solved",
                f"{label} {100 * graduated / admitted:.0f} %",
                note,
            )
        )
    return headlines


def _bold(cell: str) -> Markup:
    """Turn the one mark that cells have into HTML: bold, in another color where the number is
    negative.
    """
    text = re.sub(r"\*\*(-.*?)\*\*", r'<b class="less">\1</b>', str(escape(cell)))
    return Markup(re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", text))

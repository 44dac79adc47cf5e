"""A table as text cells, for Markdown and for the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.comparison.intervals import Estimate


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        title: Its heading.
        note: What it shows and how to read it.
        header: Names of the columns; the first column names the rows.
        rows: Cells as text, empty where there is no value.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [table.header, ("---", *["---:"] * (len(table.header) - 1)), *table.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def percent(fraction: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * fraction:.1f}"


def with_interval(estimate: Estimate) -> str:
    """Return a value with its interval, in percent."""
    return f"{percent(estimate.value)} [{percent(estimate.low)}, {percent(estimate.high)}]"


def difference(estimate: Estimate | None) -> str:
    """Return a difference with its interval, in points, bold where the interval is without 0."""
    if estimate is None:
        return ""
    value = f"{100 * estimate.value:+.1f}"
    value = f"**{value}**" if estimate.low > 0 or estimate.high < 0 else value
    return f"{value} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def fraction(count: int, total: int) -> str:
    """Return a fraction with its counts."""
    return f"{count / total:.0%} ({count}/{total})" if total else ""


def number(value: float | None, form: str) -> str:
    """Return a formatted number, nothing for none."""
    return "" if value is None else format(value, form)

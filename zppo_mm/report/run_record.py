"""What the report is drawn from: the public files of a run folder and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from zppo_mm.run_folder import RunFolder, files_by_step

Series = tuple[list[int], list[float]]
"""Steps and values of one curve."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run's files say of it.

    Attributes:
        folder: The run's folder.
        metrics: One mapping per step, ascending.
        evaluations: One mapping per evaluation on held-out questions, ascending.
        config: The resolved configuration; empty when the folder has none.
        changes: One mapping per key that was given another value on a resume, in their order.
    """

    folder: Path
    metrics: list[Mapping[str, Any]]
    evaluations: list[Mapping[str, Any]]
    config: Mapping[str, Any]
    changes: list[Mapping[str, Any]] = field(default_factory=list)

    def series(self, name: str) -> Series:
        """Return the steps that have a finite value of a metric, and the values."""
        rows = [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]
        return [step for step, _ in rows], [value for _, value in rows]

    def names(self, prefix: str) -> list[str]:
        """Return the last parts of all metric names below a prefix, numbers in their order."""
        found = {
            name.removeprefix(prefix)
            for row in self.metrics
            for name in row
            if name.startswith(prefix)
        }
        return sorted(
            found,
            key=lambda part: (
                float(part) if part.replace(".", "", 1).isdigit() else float("inf"),
                part,
            ),
        )

    def described_changes(self) -> list[tuple[str, str]]:
        """Return which keys changed after which step, in words."""
        return [
            (f"changed after step {row['step']}", f"{row['key']} {row['old']} → {row['new']}")
            for row in self.changes
        ]

    def last(self, name: str) -> float | None:
        """Return a metric's last finite value."""
        _, values = self.series(name)
        return values[-1] if values else None

    def thinned(self, most: int) -> RunRecord:
        """Return a record of at most so many rows, for figures that stay small however long the
        run is.

        Metrics become means over equal numbers of steps, each at the middle one. The last row stays
        as it is, because some values are counts since the start. Of the evaluations some are left
        out, never the first or the last.
        """
        rows = self.metrics
        if len(rows) > most:
            bins = np.array_split(np.arange(len(rows) - 1), most - 1)
            rows = [*(_mean_row([rows[index] for index in each]) for each in bins), rows[-1]]
        evaluations = self.evaluations
        if len(evaluations) > most:
            kept = np.linspace(0, len(evaluations) - 1, most).round().astype(int)
            evaluations = [evaluations[index] for index in kept]
        return replace(self, metrics=rows, evaluations=evaluations)

    def option(self, key: str) -> Any:
        """Return a value of the configuration by its dotted key, `None` where it is missing."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Average each metric over the rows that have a finite value of it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
    return {**means, "step": rows[len(rows) // 2]["step"]}


def read_run(path: Path) -> RunRecord:
    """Read a run's folder; every file may be missing."""
    folder = RunFolder(path)
    return RunRecord(
        folder=path,
        metrics=sorted(read_lines(folder.metrics), key=lambda row: row["step"]),
        evaluations=sorted(read_lines(folder.evaluations), key=lambda row: row["step"]),
        config=read_config(folder),
        changes=list(read_lines(folder.changes)),
    )


def read_config(folder: RunFolder) -> Mapping[str, Any]:
    """Return a run's resolved configuration; empty when the folder has none."""
    text = folder.config.read_text(encoding="utf-8") if folder.config.exists() else ""
    return yaml.safe_load(text) or {}


def read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield JSON lines; a missing file has none, and a torn last line, which a running program
    leaves for a moment, is left out.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def transcripts_newest_first(folder: Path) -> list[Path]:
    """Return the transcript files of a run, newest step first."""
    return [*reversed(files_by_step(RunFolder(folder).transcripts).values())]

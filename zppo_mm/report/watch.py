"""A run in a terminal while it goes on."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from zppo_mm.observability.sinks import ConsoleSink
from zppo_mm.text_table import text_table

ROWS_KEPT = 40
MEAN_ROWS = 10
BLOCKS = "▁▂▃▄▅▆▇█"
COUNTED = ("policy/skipped_updates", "rollout/failed_groups", "tracking/failures/")


class NewLines:
    """The newest JSON lines of a file that grows; each call reads only what was added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._offset = 0
        self.rows: deque[Mapping[str, Any]] = deque(maxlen=ROWS_KEPT)

    def read(self) -> None:
        """Read what was added; a file that is another or shorter, as after a resume, is read from
        its start.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            state = self._path.stat()
            if state.st_ino != self._inode or state.st_size < self._offset:
                self.rows.clear()
                self._inode, self._offset = state.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self.rows.append(json.loads(line))


def sparkline(values: Sequence[float]) -> str:
    """Return values as a row of blocks, the lowest and the highest at the ends of the scale."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def describe(
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    train_iters: int | None,
) -> str:
    """Return what a terminal shows of a run.

    Args:
        rows: Its newest lines of `metrics.jsonl`, ascending.
        evaluations: Its newest evaluations, ascending.
        train_iters: Its last step; `None` if that is not known.
    """
    if not rows:
        return "no step yet"
    lines = [_progress(rows, train_iters)]
    if evaluations:
        shown = [f"{row['accuracy']:.1%} (step {row['step']})" for row in evaluations]
        lines.append("held-out accuracy  " + "  ".join(shown[-5:]))
    lines += ["", _metrics(rows), ""]
    phases = {
        name.removeprefix("seconds/"): mean(_values(rows[-MEAN_ROWS:], name))
        for name in rows[-1]
        if name.startswith("seconds/") and name != "seconds/step" and _values(rows, name)[-1:]
    }
    longest = sorted(phases.items(), key=lambda phase: -phase[1])
    lines.append("seconds  " + "  ".join(f"{name} {value:.2f}" for name, value in longest))
    if "ranks/slowest" in rows[-1]:
        lines.append(
            f"slowest rank {rows[-1]['ranks/slowest']:.0f}, {rows[-1]['ranks/spread']:.0%} longer "
            "than the median rank"
        )
    lines += _losses(rows)
    return "\n".join(lines)


def _progress(rows: Sequence[Mapping[str, Any]], train_iters: int | None) -> str:
    step = rows[-1]["step"]
    recent = _values(rows[-MEAN_ROWS:], "seconds/step")
    seconds = mean(recent) if recent else math.nan
    text = f"step {step}" + (f" of {train_iters}" if train_iters else "")
    text += f"  {seconds:.1f} s per step"
    if train_iters and train_iters > step and recent:
        text += f"  {(train_iters - step) * seconds / 60:.1f} min left"
    return text


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the metrics of the console's lines: now, on average, and as a curve."""
    cells = []
    for shown, name, form in ConsoleSink.COLUMNS:
        values = _values(rows, name)
        if values:
            average = mean(_values(rows[-MEAN_ROWS:], name) or values)
            cells.append(
                [shown, sparkline(values), format(values[-1], form), format(average, form)]
            )
    return text_table(["", "", "last", f"mean of {MEAN_ROWS}"], cells, num_left=2)


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was lost in the rows, by metric."""
    names = sorted({name for row in rows for name in row if name.startswith(COUNTED)})
    sums = {name: sum(_values(rows, name)) for name in names}
    return [f"{name}: {value:.0f} in {len(rows)} steps" for name, value in sums.items() if value]


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]

"""Where a step's numbers go: JSON lines and the console always, trackers by choice."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tqdm import tqdm

from data.atomic_files import write_atomically
from zppo_mm.config.schema import ObservabilityConfig
from zppo_mm.methods import REFORMULATED
from zppo_mm.observability.record_writer import Write, append_bytes
from zppo_mm.observability.samples import Sample
from zppo_mm.observability.trackers import Trackers, open_trackers
from zppo_mm.run_folder import RunFolder

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)


class MetricsSink(Protocol):
    """Takes the reduced values of one step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step; steps come in ascending order."""
        ...

    def close(self) -> None:
        """Flush and release; called once, at the end."""
        ...


def append_line(path: Path, record: Mapping[str, Any], append: Write = append_bytes) -> None:
    """Append one JSON line and leave it on the disk; numbers that are not finite become null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    append(path, (json.dumps(clean, allow_nan=False) + "\n").encode())


def append_evaluation(
    folder: RunFolder, evaluation: DataclassInstance, append: Write = append_bytes
) -> None:
    """Append one evaluation, a dataclass with a `step`, to the run's `evaluation.jsonl`."""
    append_line(folder.evaluations, asdict(evaluation), append)


def truncate_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`, so that a resumed run leaves no step twice; lines that
    are no records go too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            number = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            number = None
        if type(number) is int:
            kept += [line + "\n"] if number <= step else []
        elif line:
            logger.warning("%s: dropped a line that was not written to its end", path)
    write_atomically(path, "".join(kept))


class JsonLinesSink:
    """Appends `{"step": …, name: value, …}` to `metrics.jsonl`."""

    def __init__(self, path: Path, last_step: int, append: Write = append_bytes) -> None:
        """Open the file and drop what a killed run wrote after `last_step`, the step of the
        checkpoint that goes on.
        """
        self._path, self._append = path, append
        truncate_after(path, last_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        append_line(self._path, {"step": step, **values}, self._append)

    def close(self) -> None:
        """Nothing is held between writes."""


class ConsoleSink:
    """Logs one line per step and moves a progress bar where there is a terminal."""

    # Shown name, metric, format.
    COLUMNS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("plain", "accuracy/plain", ".3f"),
        *((kind.name, f"accuracy/{kind.name}", ".3f") for kind in REFORMULATED),
        ("teacher", "teacher/accuracy", ".3f"),
        ("buffer", "buffer/size", ".0f"),
        ("loss", "policy/loss", ".4f"),
        ("entropy", "policy/entropy", ".3f"),
        ("grad", "policy/grad_norm", ".3f"),
        ("tokens/s", "throughput/tokens_per_second", ".0f"),
        ("seconds", "seconds/step", ".1f"),
    )

    def __init__(self, train_iters: int, last_step: int, progress_bar: bool) -> None:
        """Start at `last_step`; without a terminal there is no bar, only the lines."""
        self._train_iters = train_iters
        self._bar: tqdm[Any] = tqdm(
            total=train_iters,
            initial=last_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=None if progress_bar else True,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        shown = [
            f"{name} {values[metric]:{form}}"
            for name, metric, form in self.COLUMNS
            if metric in values
        ]
        logger.info("step %d/%d  %s", step, self._train_iters, "  ".join(shown))
        self._bar.set_postfix_str(
            f"plain {values['accuracy/plain']:.3f}" if "accuracy/plain" in values else ""
        )
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class MetricsLog:
    """All sinks of a run as one.

    Args:
        sinks: An error of theirs ends the run.
        trackers: Those of theirs do not, and are counted among the values of the next step.
    """

    def __init__(self, sinks: tuple[MetricsSink, ...], trackers: Trackers) -> None:
        self._sinks = sinks
        self._trackers = trackers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a step's values to every sink."""
        values = {**values, **self._trackers.take_failures()}
        for sink in (*self._sinks, self._trackers):
            sink.write(step, values)

    def write_samples(self, step: int, make: Callable[[], Sequence[Sample]]) -> None:
        """Hand samples of a step to the trackers; what makes them is called if there are any."""
        self._trackers.write_samples(step, make)

    def close(self) -> None:
        """Close every sink, the later ones too when one fails."""
        errors = []
        for sink in (*self._sinks, self._trackers):
            try:
                sink.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("metrics: some sinks did not close", errors)


def open_metrics_log(
    config: ObservabilityConfig,
    folder: RunFolder,
    train_iters: int,
    last_step: int,
    others: Sequence[MetricsSink] = (),
    append: Write = append_bytes,
) -> MetricsLog:
    """Open the sinks that the configuration asks for; call on one rank only.

    Args:
        config: Which sinks.
        folder: Where their files lie.
        train_iters: Steps of the whole run.
        last_step: Last step that the checkpoint holds, 0 at the start; later lines of
            `metrics.jsonl`, `evaluation.jsonl` and `ranks.jsonl` are dropped.
        others: Further sinks.
        append: Appends to `metrics.jsonl`.

    Raises:
        ConfigError: The package of a tracker is missing.
    """
    trackers = open_trackers(config, folder, last_step)
    for path in (folder.evaluations, folder.ranks):
        truncate_after(path, last_step)
    sinks = (
        JsonLinesSink(folder.metrics, last_step, append),
        ConsoleSink(train_iters, last_step, config.progress_bar),
    )
    return MetricsLog((*sinks, *others), trackers)

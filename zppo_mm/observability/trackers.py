"""Trackers, which show metrics and samples of runs: TensorBoard, W&B, SwanLab, Prometheus.

None of them can end a run: what fails is logged, counted and left out.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Protocol

from zppo_mm.config.monitoring import ObservabilityConfig
from zppo_mm.errors import ConfigError
from zppo_mm.observability.prometheus import PrometheusEndpoint
from zppo_mm.observability.samples import Sample
from zppo_mm.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes what a step measured, and samples of it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step; steps come in ascending order."""
        ...

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record samples of a step whose metrics were written."""
        ...

    def close(self) -> None:
        """Flush and release; called once, at the end."""
        ...


class TensorBoard:
    """Event files under `tensorboard/`; on resume the later steps of a killed run are hidden."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples, 1):
            text = f"{sample.title}\n\n{sample.text}"
            self._writer.add_text(f"samples/{number}", text, step)
            if sample.picture is not None:
                name = f"samples/{number}/media"
                self._writer.add_image(name, sample.picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _identity(project: str, offline: bool, folder: Path) -> dict[str, str | None]:
    """Return what W&B and SwanLab know a run by, in the words of both: its name, and its number if
    it was restarted, which would otherwise go on with the steps of the one before.
    """
    mode = "offline" if offline else None
    num_earlier = sum(1 for _ in takewhile(Path.exists, RunFolder(folder).earlier_records()))
    name = f"{folder.name}-{num_earlier + 1}" if num_earlier else folder.name
    return {"project": project, "name": name, "id": name, "resume": "allow", "mode": mode}


class Wandb:
    """Weights & Biases; the run's folder is the identity, so that a resumed run continues the same
    one.
    """

    def __init__(self, wandb: ModuleType, project: str, offline: bool, folder: Path) -> None:
        self._wandb = wandb
        self._run = wandb.init(dir=str(folder), **_identity(project, offline, folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        wandb = self._wandb
        rows = [[sample.title, sample.text] for sample in samples]
        pictures = [
            wandb.Image(sample.picture, caption=sample.title)
            for sample in samples
            if sample.picture is not None
        ]
        # Apart: a table keeps no picture of a column whose first entry has none.
        shown = {"samples": wandb.Table(columns=["sample", "text"], data=rows)}
        if pictures:
            shown["samples/media"] = pictures
        self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """SwanLab; the run's folder is the identity, as for W&B."""

    def __init__(self, swanlab: ModuleType, project: str, offline: bool, folder: Path) -> None:
        self._swanlab = swanlab
        self._run = swanlab.init(
            log_dir=str(folder / "swanlab"), **_identity(project, offline, folder)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples, 1):
            text = self._swanlab.Text(sample.text, caption=sample.title)
            shown = {f"samples/{number}": text}
            if sample.picture is not None:
                picture = self._swanlab.Image(sample.picture, caption=sample.title)
                shown[f"samples/{number}/media"] = picture
            self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All trackers of a run as one that never fails. Implements `MetricsSink`."""

    def __init__(self, opened: Mapping[str, Callable[[], Tracker]]) -> None:
        """Open trackers.

        Args:
            opened: What opens each, by its name.

        Raises:
            ConfigError: A package is missing.
        """
        self._failures: Counter[str] = Counter()
        self._reported: set[str] = set()
        self._trackers: dict[str, Tracker] = {}
        for name, open_tracker in opened.items():
            try:
                self._trackers[name] = open_tracker()
            except ConfigError:
                raise
            except Exception:
                self._count(name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a step's metrics to every tracker."""
        self._each(lambda tracker: tracker.write(step, values))

    def write_samples(self, step: int, make: Callable[[], Sequence[Sample]]) -> None:
        """Make samples, if there is a tracker, and hand them to every one."""
        if not self._trackers:
            return
        try:
            samples = make()
        except Exception:
            self._count("samples")
            return
        if samples:
            self._each(lambda tracker: tracker.write_samples(step, samples))

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())

    def take_failures(self) -> dict[str, float]:
        """Return the calls that failed since this was last asked, by the name of their metric."""
        taken = {f"tracking/failures/{name}": float(n) for name, n in self._failures.items()}
        self._failures.clear()
        return taken

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception:
                self._count(name)

    def _count(self, name: str) -> None:
        self._failures[name] += 1
        if name not in self._reported:
            self._reported.add(name)
            logger.exception("tracker %s: a call failed, the run goes on without it", name)


def open_trackers(config: ObservabilityConfig, folder: RunFolder, last_step: int) -> Trackers:
    """Open the trackers that the configuration asks for.

    Args:
        config: Which ones.
        folder: Of the run.
        last_step: Last step that the checkpoint holds, 0 at the start.

    Raises:
        ConfigError: A package is missing.
    """
    project, offline = config.tracker_project, config.trackers_offline
    known: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder.tensorboard, last_step),
        "wandb": lambda: Wandb(_package("wandb"), project, offline, folder.path),
        "swanlab": lambda: SwanLab(_package("swanlab"), project, offline, folder.path),
    }
    opened = {name: known[name] for name in config.trackers}
    if config.prometheus_port:
        host, port = config.prometheus_host, config.prometheus_port
        opened["prometheus"] = lambda: PrometheusEndpoint(host, port, folder.path.name)
    return Trackers(opened)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(
            f"observability.trackers: {name} cannot be imported, got {error!r}, expected an "
            f"installed {name}; install the `{name}` extra or take it out of the list"
        ) from error

"""What is compared: a YAML file as a dataclass, and the runs that follow from it, every one checked
before the first starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zppo_mm.config.key_hints import did_you_mean
from zppo_mm.config.load import load_config, load_settings
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError

SET_BY_PLAN = {"method": "methods", "seed": "seeds", "name": "methods", "output_dir": "output_dir"}
"""Options of a run that the comparison sets, and the key of the comparison that they follow
from.
"""
METHOD_KEYS = ("method", "options")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(kw_only=True)
class ComparisonConfig:
    """A comparison as its YAML file says it."""

    base: str = ""
    """Run configuration that all runs start from, relative to the working directory; empty is the
    bundled preset.
    """
    options: dict[str, Any] = field(default_factory=dict)
    """Options of all runs, by their dotted keys."""
    methods: Any = None
    """A list of methods, or labels with {method, options} each; without a method the label is
    one.
    """
    baseline: str = ""
    """Label that differences and ratios refer to; empty is the first."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of every method. A seed decides the held-out questions too, so that methods answer the
    same ones.
    """
    parts: dict[str, list[str]] = field(default_factory=dict)
    """Parts of the held-out questions that are reported, with the sources of each. The first one
    takes the place of all questions; empty is all, then every modality and every source.
    """
    contrasts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Sums of accuracies that are reported with intervals, by name: a factor per label of a
    method.
    """
    processes_per_run: int = 1
    """Processes of one run, started by torchrun where they are several."""
    parallel_runs: int = 1
    """Runs at a time."""
    output_dir: str = "runs/comparison"
    """Folder of the runs and of the report."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One method with one seed.

    Attributes:
        label: What the method is called in this comparison.
        seed: Of the run.
        folder: Where it goes.
        arguments: Of the training tool.
        config: What these arguments mean.
    """

    label: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: RunConfig

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True, slots=True)
class Plan:
    """All runs of a comparison, the seeds in their order and the methods within a seed, so that it
    can be read while it is half done.
    """

    runs: tuple[PlannedRun, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    folder: Path
    processes_per_run: int
    parallel_runs: int
    parts: Mapping[str, Sequence[str]]
    contrasts: Mapping[str, Mapping[str, float]]


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Return the runs of a comparison.

    Args:
        path: Its YAML file.
        overrides: `key=value`; a key that the file could not have is an option of all runs.

    Raises:
        ConfigError: Anything in the file or in the configuration of any run is wrong.
    """
    known = {each.name for each in fields(ComparisonConfig)}
    own = [override for override in overrides if re.split("[.=]", override)[0] in known]
    comparison = load_settings(ComparisonConfig, path, own)
    shared = [
        *_as_arguments(comparison.options),
        *(override for override in overrides if override not in own),
    ]
    methods = _methods(comparison.methods, path)
    _check(comparison, methods, path)
    return Plan(
        runs=tuple(
            _planned_run(label, method, seed, comparison, [*shared, *options])
            for seed in comparison.seeds
            for label, (method, options) in methods.items()
        ),
        labels=tuple(methods),
        seeds=tuple(comparison.seeds),
        baseline=comparison.baseline or next(iter(methods)),
        folder=Path(comparison.output_dir),
        processes_per_run=comparison.processes_per_run,
        parallel_runs=comparison.parallel_runs,
        parts=comparison.parts,
        contrasts=comparison.contrasts,
    )


def _methods(given: Any, path: Path) -> dict[str, tuple[str, list[str]]]:
    """Return method and options by label."""
    by_label: Any = dict.fromkeys(map(str, given)) if isinstance(given, list) else given
    if isinstance(by_label, Mapping) and len(by_label) < len(given):
        by_label = None
    if not isinstance(by_label, Mapping) or not by_label:
        raise ConfigError(
            f"{path}: methods is wrong, got {given!r}, expected a list of different methods, or "
            "labels with {method, options} each; see docs/comparison.md"
        )
    methods = {}
    for label, settings in by_label.items():
        settings = settings or {}
        if not _LABEL.fullmatch(str(label)) or not isinstance(settings, Mapping):
            raise ConfigError(
                f"{path}: methods: got {label!r}: {settings!r}, expected a label of letters, "
                "digits and . _ + - that does not start with a sign, and {method, options} under "
                "it; rename or rewrite it"
            )
        for key in (str(key) for key in settings if key not in METHOD_KEYS):
            raise ConfigError(
                f"{path}: unknown key, got methods.{label}.{key}, expected method or "
                f"options{did_you_mean(key, METHOD_KEYS)}"
            )
        methods[str(label)] = (
            str(settings.get("method", label)),
            _as_arguments(settings.get("options") or {}),
        )
    return methods


def _check(comparison: ComparisonConfig, methods: Collection[str], path: Path) -> None:
    """Check what no run's own configuration shows to be wrong."""
    for key in ("processes_per_run", "parallel_runs"):
        if getattr(comparison, key) < 1:
            raise ConfigError(
                f"{path}: {key} is out of range, got {getattr(comparison, key)}, expected at least "
                "1; correct it"
            )
    if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds):
        raise ConfigError(
            f"{path}: seeds is wrong, got {comparison.seeds}, expected at least one seed and none "
            "twice; correct the list"
        )
    for key, things in (("parts", "source"), ("contrasts", "method")):
        for name in (name for name, each in getattr(comparison, key).items() if not each):
            raise ConfigError(
                f"{path}: {key}.{name} has no {things}, got an empty one, expected at least one "
                f"{things}; name it or remove the line"
            )
    named = {"baseline": [comparison.baseline] if comparison.baseline else []}
    named |= {f"contrasts.{name}": list(each) for name, each in comparison.contrasts.items()}
    for key, labels in named.items():
        for label in labels:
            if label not in methods:
                raise ConfigError(
                    f"{path}: {key} names an unknown method, got {label!r}, expected one of "
                    f"{', '.join(methods)}{did_you_mean(label, methods)}"
                )


def _planned_run(
    label: str, method: str, seed: int, comparison: ComparisonConfig, options: Sequence[str]
) -> PlannedRun:
    """Return one run, its configuration checked as the training tool would.

    Raises:
        ConfigError: The run could not start.
    """
    for key in (re.split("[.=]", option)[0] for option in options):
        if key in SET_BY_PLAN:
            raise ConfigError(
                f"options: {key} follows from the comparison, got it as an option, expected "
                f"{SET_BY_PLAN[key]} to say it"
            )
    folder = Path(comparison.output_dir) / f"{label}-seed{seed}"
    arguments = [
        *options,
        f"method={method}",
        f"seed={seed}",
        f"name={folder.name}",
        f"output_dir={comparison.output_dir}",
    ]
    try:
        config = load_config(comparison.base or None, arguments)
    except ConfigError as error:
        raise ConfigError(f"methods.{label}: {error}") from error
    base = [f"--config={comparison.base}"] if comparison.base else []
    return PlannedRun(label, seed, folder, (*base, *arguments), config)


def _as_arguments(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested or dotted options as `key.sub=value`; JSON values are YAML too."""
    arguments: list[str] = []
    for key, value in options.items():
        if isinstance(value, Mapping):
            arguments += _as_arguments(value, f"{prefix}{key}.")
        else:
            arguments.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}")
    return arguments

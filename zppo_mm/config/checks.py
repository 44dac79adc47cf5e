"""Checks of a configuration's values by what is declared of their keys."""

from __future__ import annotations

import json
from typing import Any

from zppo_mm.config.key_hints import every_key, key_hint
from zppo_mm.config.keys import Key, declared, default_of, may_change_on_resume, walk
from zppo_mm.config.relations import check_relations
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError


def check_config(config: RunConfig) -> None:
    """Raise on the first value that cannot be used.

    Raises:
        ConfigError: A string that is no choice, a number out of its range, or keys that contradict
            one another.
    """
    for path, own, value in walk(config):
        known = declared(own)
        _check_value(path, known, value)
        is_fallback = path.startswith("fallback_teachers[")
        if is_fallback and known.first_teacher_only and value != default_of(own):
            raise ConfigError(
                f"{path}: only the first teacher has this key, got {value!r}, expected none; set "
                f"teacher.{own.name} or remove it"
            )
    _check_allow_changes(config.checkpoint.allow_changes)
    check_relations(config)


def check_values(values: Any, where: str) -> None:
    """Check the values of a dataclass other than a run's by what is declared of them.

    Args:
        values: Whose fields are declared by `key` and `section`.
        where: Its file, in the message.

    Raises:
        ConfigError: A string that is no choice, or a number out of its range.
    """
    for path, own, value in walk(values):
        _check_value(f"{where}: {path}", declared(own), value)


def _check_value(path: str, known: Key, value: Any) -> None:
    """Check one value by itself; of a list, every entry."""
    for entry in value if isinstance(value, list) else [value]:
        if known.choices and entry not in known.choices:
            former = known.former_choices.get(entry)
            raise ConfigError(
                f"{path}: not a choice, got {entry!r}, expected one of "
                f"{', '.join(repr(choice) for choice in known.choices)}; "
                + (f"write {former}" if former else "correct it")
            )
    if isinstance(value, dict):
        thinking = value.get("enable_thinking", True)
        if not isinstance(thinking, bool):
            # Templates compare it with false, or take any text for true.
            raise ConfigError(
                f"{path}.enable_thinking: neither true nor false, got {thinking!r}, expected one "
                "of them without quotes; correct it"
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: not JSON, got {value!r} ({error}), expected texts, finite numbers, "
                "true, false, null, lists and mappings; correct it"
            ) from error
    for number in value if isinstance(value, list) else [value]:
        if known.range and not known.is_in_range(number):
            raise ConfigError(
                f"{path}: out of range, got {number}, expected {known.range}; correct it"
            )


def _check_allow_changes(named: list[str]) -> None:
    """Check that each is a key, or a section with keys, that a resumed run may change."""
    known = [path for path, _ in every_key(RunConfig)]
    for name in named:
        meant = [path for path in known if path == name or path.startswith(f"{name}.")]
        if not meant:
            raise ConfigError(
                f"checkpoint.allow_changes: unknown key, got {name!r}, expected a key or section "
                f"of the configuration; {key_hint(name, known, RunConfig)}"
            )
        if not any(may_change_on_resume(RunConfig, path) for path in meant):
            raise ConfigError(
                f"checkpoint.allow_changes: a run keeps this key, got {name!r}, expected one that "
                "docs/configuration.md marks with consent; start a new run from the trained "
                "weights, or remove it"
            )

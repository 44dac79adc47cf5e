"""Reading and writing a run's configuration: defaults, then a preset or a YAML file, then
`key.sub=value`.

Every key is checked against the dataclasses of `zppo_mm.config.schema` before anything is merged,
so a misspelt key is an error that names where it came from. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.atomic_files import write_atomically
from zppo_mm.config.checks import check_config
from zppo_mm.config.key_hints import did_you_mean, key_hint
from zppo_mm.config.keys import entry_type
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.methods import METHODS

PRESETS_FOLDER = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny"

_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True)
class _Layer:
    """Some keys of the configuration and where they came from."""

    origin: str
    content: DictConfig


def load_config(config_path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked configuration of a run.

    Later sources take precedence: the dataclass defaults; the bundled preset `tiny` when no file is
    given; the keys that the method sets; the YAML file; the overrides in their order.

    Args:
        config_path: A YAML file, or `None` for the bundled preset.
        overrides: `key=value` or `key.sub=value`; values are YAML.

    Raises:
        ConfigError: An unknown key, a value of the wrong type or out of its range, or a file that
            cannot be read.
    """
    preset = (
        []
        if config_path is not None
        else [_read_yaml(PRESETS_FOLDER / f"{DEFAULT_PRESET}.yaml", f"preset {DEFAULT_PRESET}")]
    )
    given = [_read_yaml(Path(config_path), str(config_path))] if config_path is not None else []
    given += [_read_override(override) for override in overrides]
    for layer in [*preset, *given]:
        _check_keys(layer, RunConfig)
    method = _chosen_method([*preset, *given])
    method_keys = _Layer(
        f"method {method}",
        OmegaConf.from_dotlist(
            [f"{key}={value}" for key, value in METHODS[method].settings.items()]
        ),
    )
    config = _merge([*preset, method_keys, *given], RunConfig)
    check_config(config)
    return config


def load_settings(kind: type[_Kind], path: Path, overrides: Sequence[str] = ()) -> _Kind:
    """Return a dataclass other than a run's from its YAML file and overrides, keys and types
    checked alike.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or a file that cannot be read.
    """
    layers = [_read_yaml(path, str(path)), *(_read_override(override) for override in overrides)]
    for layer in layers:
        _check_keys(layer, kind)
    return _merge(layers, kind)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the whole resolved configuration as YAML that `load_config` reads back to an equal
    one.
    """
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def flat_keys(values: Mapping[str, Any], kind: Any = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return dotted keys to values; the entries of a list of sections are numbered, and a mapping
    is one value.

    Args:
        values: Of a section, by name.
        kind: Its dataclass.
        prefix: Of its keys.
    """
    hints = get_type_hints(kind)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path, inner = f"{prefix}{name}", entry_type(hints.get(name))
        if inner is None:
            flat[path] = value
        elif isinstance(value, list):
            flat[f"{path}.count"] = len(value)
            for index, item in enumerate(value):
                flat.update(flat_keys(item, inner, f"{path}.{index}."))
        else:
            flat.update(flat_keys(value, inner, f"{path}."))
    return flat


def _read_yaml(path: Path, origin: str) -> _Layer:
    """Read one YAML file whose root is a mapping."""
    try:
        content = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}; correct the file") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(
            f"{origin}: the root is wrong, got a list, expected a mapping such as `train: {{lr: "
            "1e-6}`; correct the file"
        )
    return _Layer(origin, content)


def _read_override(override: str) -> _Layer:
    """Read one `key.sub=value`."""
    origin = f"argument `{override}`"
    key, equals, value = override.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(
            f"{origin}: not an option, got {override!r}, expected key=value or key.sub=value; see "
            "--help for all keys"
        )
    try:
        # YAML reads nothing as null, but `name=` on a command line means the empty string.
        return _Layer(origin, OmegaConf.from_dotlist([override if value else f"{key}=''"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin}: the value is not valid YAML: {error}; quote it") from error


def _chosen_method(layers: Sequence[_Layer]) -> str:
    """Return the method that the last layer names, the default when none does."""
    method, origin = RunConfig().method, "default"
    for layer in layers:
        if "method" in layer.content:
            method, origin = layer.content["method"], layer.origin
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(
            f"{origin}: unknown method, got {method!r}, expected one of "
            f"{', '.join(METHODS)}{did_you_mean(str(method), METHODS)}"
        )
    return method


def _check_keys(layer: _Layer, kind: Any) -> None:
    """Raise on the first key of a layer that no dataclass has."""
    content = OmegaConf.to_container(layer.content, resolve=False)
    for key, known in _unknown_keys(content, kind, ""):
        raise ConfigError(
            f"{layer.origin}: unknown key, got {key}, expected a key of the configuration; "
            f"{key_hint(key, known, kind)}"
        )


def _unknown_keys(content: Any, kind: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each dotted key that `kind` lacks, with the known dotted keys beside it."""
    if isinstance(content, list):
        for item in content:
            yield from _unknown_keys(item, (get_args(kind) or (None,))[0], prefix)
    if not isinstance(content, dict) or not is_dataclass(kind):
        return
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key in hints:
            yield from _unknown_keys(value, hints[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", [f"{prefix}{name}" for name in hints]


def _emptied(content: Any, kind: Any, prefix: str) -> Iterator[str]:
    """Yield the dotted keys of mappings that are no sections and that a layer sets to `{}`; a merge
    would keep what they held.
    """
    if not isinstance(content, dict):
        return
    hints = get_type_hints(kind)
    for name, value in content.items():
        if is_dataclass(hints[name]):
            yield from _emptied(value, hints[name], f"{prefix}{name}.")
        elif value == {}:
            yield f"{prefix}{name}"


def _merge(layers: Sequence[_Layer], kind: type[_Kind]) -> _Kind:
    """Merge layers into the dataclasses, naming the layer whose value does not fit its field's
    type.
    """
    merged = OmegaConf.structured(kind)
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer.content)
            content = OmegaConf.to_container(layer.content, resolve=False)
            for key in _emptied(content, kind, ""):
                OmegaConf.update(merged, key, {}, merge=False)
            # Interpolations are resolved here, while the layer that holds them can still be named.
            resolved = OmegaConf.to_object(merged)
        except (OmegaConfBaseException, TypeError) as error:
            # A list for a mapping is a TypeError that names no key.
            reason = str(error).splitlines()[0]
            key = getattr(error, "full_key", None) or "the value"
            raise ConfigError(
                f"{layer.origin}: {key} has the wrong type: {reason}; see --help for the type of "
                "every key"
            ) from error
    return cast(_Kind, resolved)

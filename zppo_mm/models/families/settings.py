"""config.json as transformers reads it, and the refusal of what the network would silently compute
differently.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zppo_mm.errors import ModelError
from zppo_mm.models.families.config_keys import (
    BUILT,
    BUILT_OUTSIDE,
    FOREIGN,
    HARMLESS,
    LARGEST,
    LARGEST_OF,
    MEDIA_TOKENS,
    READ,
    READ_OUTSIDE,
    ROPE_SPELLINGS,
    SIZES,
    same_value,
)
from zppo_mm.models.families.rope import check_spellings

MAX_FILE_BYTES = 1 << 26
"""Of a config.json or an index; the largest published indexes have some ten megabytes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A parsed config.json.

    Attributes:
        where: The file in messages.
        title: The family's name in messages.
        raw: The whole file.
        outer: transformers' configuration of all of it: defaults filled in, older spellings read.
        text: The same of the language model.
        vision: The same of the vision tower, `None` in a text-only network.
    """

    where: str
    title: str
    raw: dict[str, Any]
    outer: Any
    text: Any
    vision: Any | None

    @property
    def head_dim(self) -> int:
        """Width of a head of full attention."""
        text = self.text
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return a parsed config.json.

    Raises:
        ModelError: The file is missing, or is no JSON object.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        raw = json.loads(content.decode("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: the file is missing, expected a Hugging Face model folder; check the path"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON, got {error}; download or export the folder again"
        ) from error
    if not isinstance(raw, dict):
        raise ModelError(
            f"{path}: is no JSON object, got {type(raw).__name__}; download or export the folder "
            "again"
        )
    return raw


def read_settings(raw: dict[str, Any], where: str, title: str) -> Settings:
    """Read a config.json of a family that transformers knows.

    Args:
        raw: The parsed file.
        where: Its name in messages.
        title: The family's name in messages.

    Raises:
        ModelError: transformers cannot read it, a size is missing, or a setting is not the one that
            is built or is there twice.
    """
    inner, has_tower = _text_part(raw, where), _has_tower(raw)
    missing = [key for key in SIZES if inner.get(key) is None]
    if has_tower and not isinstance(raw.get("vision_config"), dict):
        missing.append("vision_config")
    if missing:
        raise ModelError(
            f"{where}: the key {missing[0]!r} is missing, expected a complete {title} config; "
            "download the folder again"
        )
    for key in SIZES:
        # Before transformers, which makes a list of as many layers as the file says.
        check_size(key, inner[key], where)
    for section in (raw, inner):
        _check_quantisation(section, where)
        _check_foreign(section, where, title)
    outer = _as_transformers(raw, where)
    text, vision = (outer.text_config, outer.vision_config) if has_tower else (outer, None)
    if any(inner[key] != getattr(text, key) for key in SIZES):
        # Around it, most families' classes do not read the language model's settings.
        raise ModelError(
            f"{where}: the key 'text_config' is missing, expected a complete {title} config; "
            "download the folder again"
        )
    settings = Settings(where, title, raw, outer, text, vision)
    _check_rope(inner, text, where)
    check_values(settings, text, BUILT)
    check_values(settings, outer, BUILT_OUTSIDE)
    _check_unknown(settings, text, (READ, BUILT, HARMLESS))
    _check_unknown(settings, outer, (READ, BUILT, HARMLESS, READ_OUTSIDE))
    return settings


def text_level(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file with an inner language part says about the language model outside it,
    where transformers does not read it.
    """
    if not isinstance(raw.get("text_config"), dict):
        return {}
    return {
        key: value
        for key, value in raw.items()
        if key in READ | set(BUILT) and key not in READ_OUTSIDE
    }


def check_size(key: str, value: Any, where: str) -> None:
    """Refuse what is no size of a network.

    Args:
        key: Its name in config.json, also inside an object.
        value: The value there.
        where: The file in messages.

    Raises:
        ModelError: It is no whole number, not positive, or larger than any.
    """
    largest = LARGEST_OF.get(key.rpartition(".")[2], LARGEST)
    if type(value) is not int or not 1 <= value <= largest:
        shown = reprlib.repr(value)
        raise ModelError(
            f"{where}: {key} is no size, got {shown}, expected a whole number from 1 to {largest}; "
            "correct the file"
        )


def check_values(settings: Settings, part: Any, built: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a setting that is there with another value than those that are built.

    Args:
        settings: Name the file and the family.
        part: transformers' configuration of the part.
        built: The values by key; what the part does not have is as it is built.

    Raises:
        ModelError: A setting has another value.
    """
    for key, allowed in built.items():
        value = getattr(part, key, allowed[0])
        if not any(same_value(value, one) for one in allowed):
            raise refusal(settings, key, value, allowed)


def refusal(settings: Settings, key: str, value: Any, allowed: Collection[Any]) -> ModelError:
    """Return the error for a setting that is not supported."""
    named = [one for one in allowed if one is not None] or [None]
    return ModelError(
        f"{settings.where}: {key} is not supported, got {value!r}, expected "
        f"{' or '.join(map(repr, named))}; use an unmodified {settings.title} folder"
    )


def _has_tower(raw: Mapping[str, Any]) -> bool:
    return "vision_config" in CONFIG_MAPPING[raw["model_type"]].sub_configs


def _text_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the language model's part of the file: an object of its own, or the whole file."""
    part = raw.get("text_config") if _has_tower(raw) else raw
    if part is None:
        part = raw
    if not isinstance(part, dict):
        raise ModelError(
            f"{where}: text_config is no JSON object, got {type(part).__name__}; download the "
            "folder again"
        )
    return part


def _as_transformers(raw: dict[str, Any], where: str) -> Any:
    """Return transformers' configuration of the file, which it may change while reading."""
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))
    except Exception as error:
        # Its checks raise errors of their own and of other libraries.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{where}: transformers cannot read it, got {type(error).__name__}: {reason}, expected "
            "a config that it knows; correct the file, or download the folder again"
        ) from error


def _check_quantisation(section: Mapping[str, Any], where: str) -> None:
    found = section.get("quantization_config")
    method = found.get("quant_method", "fp8") if isinstance(found, dict) else found
    if isinstance(found, dict) and (found.get("load_in_8bit") or found.get("load_in_4bit")):
        # transformers reads these two before the method.
        method = "bitsandbytes"
    if method not in (None, "fp8"):
        raise ModelError(
            f"{where}: quantization_config is not supported, got {method!r}, expected weights in "
            "blocks of fp8, or none; use a folder that is not quantised"
        )


def _check_rope(section: Mapping[str, Any], text: Any, where: str) -> None:
    for spelling in ROPE_SPELLINGS:
        inner = section.get(spelling)
        if inner is not None and not isinstance(inner, dict):
            raise ModelError(
                f"{where}: {spelling} is no JSON object, got {inner!r}, expected one or null; "
                "correct the file"
            )
        nested = [key for key, value in (inner or {}).items() if isinstance(value, dict)]
        if nested:
            raise ModelError(
                f"{where}: {spelling} has settings for kinds of layers, got {nested}, expected the "
                "same for all layers; use a folder with one rotary embedding"
            )
    check_spellings(section, text.rope_parameters, where)


def _check_foreign(section: Mapping[str, Any], where: str, title: str) -> None:
    for key, neutral in FOREIGN.items():
        if key in section and not any(same_value(section[key], one) for one in neutral):
            raise ModelError(
                f"{where}: {key} is a setting of another architecture, got {section[key]!r}, "
                f"expected none in a {title} folder; check model_type, or remove the key if the "
                "model was not trained with it"
            )


def _check_unknown(settings: Settings, part: Any, tables: Collection[Collection[str]]) -> None:
    """Refuse a key that only a newer version of transformers knows, unless it has the value that a
    file without it has.
    """
    for field in dataclasses.fields(part):
        if any(field.name in table for table in tables):
            continue
        value = getattr(part, field.name)
        if not same_value(value, field.default):
            raise refusal(settings, field.name, value, [field.default])


def media_tokens(settings: Settings) -> dict[str, int]:
    """Return the ids of the tokens that media are shown by; -1 in a text-only network."""
    return {
        name: getattr(settings.outer, name) if settings.vision is not None else -1
        for name in MEDIA_TOKENS
    }

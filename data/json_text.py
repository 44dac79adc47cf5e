"""Foreign JSON, read strictly: UTF-8, every key once, and only text that can be written again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from data.errors import SampleError, shown
from data.text import is_valid_text

TEXT_RULE = "expected text that can be written as UTF-8, without NUL and half surrogate pairs"
MAX_DEPTH = 64  # what reads a value may call itself for each level


class InvalidText(ValueError):
    """A text breaks the rule of `data.text`."""


def load_json(content: bytes, *, is_table: bool = False) -> Any:
    """Return the value that JSON spells.

    Args:
        content: All of it.
        is_table: It holds many rows. The caller reads their texts, one row after another, and
            NaN and Infinity, which Python and pandas write where a row has no value, are `None`.

    Raises:
        InvalidText: It holds text that breaks the rule of `data.text`.
        ValueError: It is not valid JSON in UTF-8, too deeply nested, or has a key twice in one
            object.
    """
    text = content.decode("utf-8-sig")
    try:
        value = json.loads(
            text, object_pairs_hook=_each_once, parse_constant=_no_value if is_table else _refuse
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"nested too deeply, expected at most {MAX_DEPTH} levels")
    # Nothing else spells what UTF-8 and JSON's own rules do not let through.
    if not is_table and "\\u" in text:
        check_texts(value)
    return value


def load_object(where: str, content: bytes) -> dict[str, Any]:
    """Return the object that JSON spells.

    Raises:
        SampleError: `bad_text` or `bad_json`.
    """
    try:
        value = load_json(content)
    except InvalidText as error:
        raise SampleError("bad_text", f"{where}: {error}, {TEXT_RULE}; correct it") from error
    except ValueError as error:
        raise SampleError(
            "bad_json", f"{where}: not valid JSON ({shown(str(error))}); write it again"
        ) from error
    if not isinstance(value, dict):
        raise SampleError(
            "bad_json",
            f"{where}: not an object, got {type(value).__name__}, expected fields; correct it",
        )
    return value


def check_texts(value: Any) -> None:
    """Visit every text inside of lists and objects, keys included.

    Raises:
        InvalidText: One breaks the rule of `data.text`.
    """
    for text in _texts(value):
        if not is_valid_text(text):
            raise InvalidText(f"invalid text, got {text[:60]!a}")


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            waiting += [*entry, *entry.values()]
        elif isinstance(entry, list | tuple):
            waiting += entry


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"key {shown(name)!a} is there twice")
        fields[name] = value
    return fields


def _no_value(constant: str) -> None:
    return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _is_deeper(value: Any, limit: int) -> bool:
    """Return whether lists and objects lie deeper in each other than a limit, without a call for
    each level.
    """
    level = [value]
    for _ in range(limit):
        level = [
            entry
            for outer in level
            if isinstance(outer, dict | list)
            for entry in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(entry, dict | list) for entry in level)

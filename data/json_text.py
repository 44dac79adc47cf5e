"""Foreign JSON, read strictly: UTF-8, every key once, and only text that can be written again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from data.errors import SampleError
from data.text import is_valid_text

TEXT_RULE = "expected text that can be written as UTF-8, without NUL and half surrogate pairs"


class InvalidText(ValueError):
    """A text breaks the rule of `data.text`."""


def load_json(content: bytes, *, any_text: bool = False) -> Any:
    """Return the value that JSON spells.

    Args:
        content: All of it.
        any_text: Leave it to the caller to look at the texts, one row after another.

    Raises:
        InvalidText: It holds text that breaks the rule of `data.text`.
        ValueError: It is no JSON in UTF-8 (NaN and Infinity are none), too deeply nested, or has a key twice in one object, of which
            one would be lost.
    """
    text = content.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_each_once, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not any_text and "\\u" in text:  # nothing else spells what UTF-8 and JSON's own rules do not let through
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
        raise SampleError("bad_json", f"{where}: no JSON ({error}); write it anew") from error
    if not isinstance(value, dict):
        raise SampleError("bad_json", f"{where}: no object, got {type(value).__name__}, expected fields; correct it")
    return value


def check_texts(value: Any) -> None:
    """Look at every text inside of lists and objects, keys included.

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
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!a} is there twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

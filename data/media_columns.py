"""Find media that a row holds or names in fields that are not read.

Without its picture it would be another question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_THING = (
    r"(?:image|img|picture|pic|photo|photograph|figure|screenshot|frame|thumbnail|video|clip|movie"
    r"|media|audio)s?"
)
_ADDRESS = r"(?:path|file|filename|file_name|name|url|uri|link)s?"
_NAME = re.compile(
    rf"(?:(?!(?:has|is|num|no|n|with|needs|contains|count|total)_)\w+_)?{_THING}_?\d*(?:_{_ADDRESS})?(?:_(?:bytes|b64|base64|data))?"
)
_ADDRESS_NAME = re.compile(rf".*_{_ADDRESS}")
_FILE = re.compile(
    r"\S[^\n]{0,500}\.(?:jpe?g|png|webp|bmp|gif|tiff?|heic|avif|svg|mp4|m4v|mov|webm|mkv|avi)",
    re.IGNORECASE,
)
_DATA_URL = re.compile(r"data:(?:image|video|audio)/")


def unmapped_media(fields: Mapping[str, Any], read: Iterable[str], has_media: bool) -> list[str]:
    """Return the fields that hold or name media and are not read.

    Args:
        fields: Values by name.
        read: Names of those that are read, or that the user says are to be left out; a dot leads
            into an object, of which the rest is not read.
        has_media: Other fields gave media: then a file's name or address is taken for that of one
            of them.
    """
    return _unmapped(fields, set(read), has_media, is_inner=False)


def _unmapped(
    fields: Mapping[str, Any], read: set[str], has_media: bool, *, is_inner: bool
) -> list[str]:
    found: list[str] = []
    for name, value in fields.items():
        if name in read:
            continue
        inside = {each.removeprefix(f"{name}.") for each in read if each.startswith(f"{name}.")}
        if inside and isinstance(value, Mapping):
            unread = _unmapped(value, inside, has_media, is_inner=True)
            found += [f"{name}.{inner}" for inner in unread]
        elif _is_media(name, value, has_media, is_inner=is_inner):
            found.append(name)
    return found


def _is_media(name: str, value: Any, has_media: bool, *, is_inner: bool = False) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_media(name, entry, has_media, is_inner=is_inner) for entry in value)
    if isinstance(value, bytes | bytearray):
        return True
    if isinstance(value, Mapping):
        if {"bytes", "path"} <= set(value):
            return any(value.get(part) is not None for part in ("bytes", "path"))
        return any(
            _is_media(str(inner), entry, has_media, is_inner=True) for inner, entry in value.items()
        )
    if not isinstance(value, str) or not value.strip():
        return False
    if _DATA_URL.match(value):
        return True
    if has_media and is_inner:  # messages repeat the names of what the columns hold
        return False
    plain = re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]+", "_", name
    ).lower()  # imageUrl and "image path" are image_url and image_path
    if _NAME.fullmatch(plain):
        return not (has_media and _ADDRESS_NAME.fullmatch(plain))
    return not has_media and _FILE.fullmatch(value.strip()) is not None

"""Media that a row holds or names where nobody looks for them: a question without its picture is another question."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data.errors import SampleError
from data.question import MediaRef

_THING = r"(?:image|img|picture|pic|photo|photograph|figure|screenshot|frame|thumbnail|video|clip|movie|media|audio)s?"
_ADDRESS = r"(?:path|file|filename|file_name|name|url|uri|link)s?"
_NAME = re.compile(
    rf"(?:(?!(?:has|is|num|no|n|with|needs|contains|count|total)_)\w+_)?{_THING}_?\d*(?:_{_ADDRESS})?(?:_(?:bytes|b64|base64|data))?"
)
_ADDRESS_NAME = re.compile(rf".*_{_ADDRESS}")
_FILE = re.compile(r"\S[^\n]{0,500}\.(?:jpe?g|png|webp|bmp|gif|tiff?|heic|avif|svg|mp4|m4v|mov|webm|mkv|avi)", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(?:image|video|audio)/")
_MARKER = re.compile(r"<(image|video)[ _]?(\d{0,9})>")


def unmapped_media(fields: Mapping[str, Any], read: Iterable[str], has_media: bool) -> list[str]:
    """Return the fields that hold or name media and are not read.

    Args:
        fields: Values by name.
        read: Names of those that are read, or that the user says are to be left out.
        has_media: Other fields gave media: then a file's name or address is taken for that of one of them.
    """
    known = set(read)
    return [name for name, value in fields.items() if name not in known and _is_media(name, value, has_media)]


def check_markers(where: str, texts: Sequence[str], media: Sequence[MediaRef]) -> None:
    """Refuse a question whose `<image>`, `<image 2>` and `<video>` are not as many as its media.

    Raises:
        SampleError: `missing_media`.
    """
    for kind in ("image", "video"):
        have = sum(reference.kind == kind for reference in media)
        found = [match[2] for text in texts for match in _MARKER.finditer(text) if match[1] == kind]
        bare = found.count("")
        highest = max((int(number) for number in found if number), default=0)
        if (bare and bare != have) or highest > have:
            got = f"got {bare} times <{kind}>" if bare and bare != have else f"got <{kind} {highest}>"
            expected = "expected as many; add or name the media, or take out the marker"
            raise SampleError("missing_media", f"{where}: the text does not fit its media, {got} and {have} of kind {kind}, {expected}")


def _is_media(name: str, value: Any, has_media: bool) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_media(name, entry, has_media) for entry in value)
    if isinstance(value, bytes | bytearray):
        return True
    if isinstance(value, Mapping):
        return {"bytes", "path"} <= set(value) and any(value.get(part) is not None for part in ("bytes", "path"))
    if not isinstance(value, str) or not value.strip():
        return False
    if _DATA_URL.match(value):
        return True
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]+", "_", name).lower()  # imageUrl and "image path" are image_url and image_path
    if _NAME.fullmatch(plain):
        return not (has_media and _ADDRESS_NAME.fullmatch(plain))
    return not has_media and _FILE.fullmatch(value.strip()) is not None

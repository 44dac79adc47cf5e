"""A row as the fields of KEY.json and media: one rule for the reader, the converter and lint."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

from data.errors import DataError, SampleError, shown
from data.json_text import TEXT_RULE, InvalidText, check_texts
from data.media_columns import unmapped_media
from data.messages import read_messages
from data.question import MediaKind
from data.sample import FIELDS, MAX_MEDIA, media_kind

MEDIA_PARTS: Mapping[str, MediaKind | None] = {
    "image": "image",
    "images": "image",
    "video": "video",
    "videos": "video",
    "media": None,
}
"""Parts of a question that hold media, in the order in which the prompt shows them; those of
`media` are known by the ending of a path.
"""
IGNORE = "ignore"
OWN_FIELDS = (*(name for name in FIELDS if name != "media"), "metadata")
PARTS = (*OWN_FIELDS, *MEDIA_PARTS, IGNORE)
"""What a source's `columns` can name."""
TEXT_PARTS = ("id", "question", "answer", "answer_type", "source")
MIN_BASE64 = 256
"""Of a text that is taken for a file in base64 without `data:` before it; a path has its dot
earlier.
"""
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_DATA_URL = re.compile(r"data:(?:(?:image|video)/([\w.+-]+))?[\w.+;=-]*;base64,")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_MIME_ENDINGS = {"quicktime": "mov", "x-matroska": "mkv", "x-msvideo": "avi", "x-ms-bmp": "bmp"}


class Held:
    """Stands for bytes of a table that were not read."""


HELD = Held()


@dataclass(frozen=True, slots=True)
class Medium:
    """One image or video of a row.

    Attributes:
        kind: What it is.
        column: Of the row.
        index: Among the values of the column.
        value: A path, or the content as the row holds it.
        ending: Of the path or the content, as far as it is known without reading it.
    """

    kind: MediaKind
    column: str
    index: int
    value: Any
    ending: str

    @property
    def path(self) -> str | None:
        """Path of its file, `None` if the row holds the content."""
        return None if holds_content(self.value) else path_of(self.value)


@dataclass(frozen=True, slots=True)
class RowRules:
    """How the columns of a source become a question.

    Attributes:
        columns: Columns by part of a question, several with commas between them; a part that is
            not named has the column of its own name.
        answer_type: Of rows that name none; empty: `choice` with choices, `math` without.

    Raises:
        DataError: An unknown part, or a column of media that is named twice.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    answer_type: str = ""

    def __post_init__(self) -> None:
        wrong = [part for part in self.columns if part not in PARTS]
        if wrong:
            raise DataError(
                f"columns: unknown part of a question, got {wrong[0]!r}, expected one of "
                f"{', '.join(PARTS)}; write columns: {{part: column}}"
            )
        media = Counter(column for part in (*MEDIA_PARTS, IGNORE) for column in self._given(part))
        twice = [column for column, count in media.items() if count > 1]
        if twice:
            raise DataError(
                f"columns: a column of media is named twice, got {twice[0]!r}, expected it under "
                f"one of {', '.join((*MEDIA_PARTS, IGNORE))}; remove the others"
            )

    def of(self, part: str) -> list[str]:
        """Return the columns of a part."""
        if part in self.columns:
            return self._given(part)
        is_left_out = part == IGNORE or part in self._given(IGNORE) or self._is_taken(part)
        return [] if is_left_out else [part]

    def _given(self, part: str) -> list[str]:
        return [name.strip() for name in self.columns.get(part, "").split(",") if name.strip()]

    def _is_taken(self, part: str) -> bool:
        """Return whether other media are read from the column of a media part's own name, or from
        inside it.
        """
        given = {column.split(".")[0] for other in MEDIA_PARTS for column in self._given(other)}
        return part in MEDIA_PARTS and part in given

    def named(self) -> set[str]:
        """Return the columns that the user names as parts of a question."""
        return {column for part in self.columns if part != IGNORE for column in self.of(part)}

    def read(self) -> set[str]:
        """Return every column that is read or left out on purpose."""
        return {column for part in PARTS for column in self.of(part)}


def question_fields(
    where: str, row: Mapping[str, Any], rules: RowRules, default_id: str
) -> tuple[dict[str, Any], list[Medium]]:
    """Return the fields of KEY.json, without `media`, and the media of a row. Those of `messages`
    become texts.

    Args:
        where: File and number of the row, for messages.
        row: Values by column.
        rules: What the columns are.
        default_id: Of a row that has none.

    Raises:
        SampleError: A value is no text or no medium, or a column that is not read has media.
    """
    try:
        check_texts(row)
    except InvalidText as error:
        raise SampleError("bad_text", f"{where}: {error}, {TEXT_RULE}; correct it") from error
    media = row_media(where, row, rules)
    fields = {
        part: value
        for part in OWN_FIELDS
        if (value := _one_value(where, row, rules, part)) is not None
    }
    if "messages" in fields:
        media += _read_conversation(where, row, rules, fields, media)
    _check_all_read(where, row, rules, has_media=bool(media))
    fields |= {part: _as_text(fields[part]) for part in TEXT_PARTS if part in fields}
    if isinstance(fields.get("choices"), list):
        fields["choices"] = [_as_text(choice) for choice in fields["choices"]]
        if not fields["choices"]:
            del fields["choices"]
    if "metadata" in fields:
        fields["metadata"] = as_json(where, fields["metadata"])
    answer_type = rules.answer_type or ("choice" if "choices" in fields else "math")
    return {"id": default_id, "answer_type": answer_type, **fields}, media


def row_media(where: str, row: Mapping[str, Any], rules: RowRules) -> list[Medium]:
    """Return the media of a row in the order in which the prompt shows them.

    Raises:
        SampleError: A value is no medium, or they are too many.
    """
    media: list[Medium] = []
    for part, kind in MEDIA_PARTS.items():
        for column in rules.of(part):
            cell = row_value(row, column)
            values = () if _is_nothing(cell) else cell_values(cell)
            for index, value in enumerate(values):
                media.append(_medium(where, kind, column, index, value))
    if len(media) > MAX_MEDIA:
        got = f"got {len(media)}, expected at most {MAX_MEDIA}"
        raise SampleError("bad_field", f"{where}: too many media files, {got}; leave some out")
    return media


def _read_conversation(
    where: str,
    row: Mapping[str, Any],
    rules: RowRules,
    fields: dict[str, Any],
    others: Sequence[Medium],
) -> list[Medium]:
    """Put the messages as texts into the fields, and return the media that they hold."""
    turns, held = read_messages(where, fields["messages"])
    fields["messages"] = [{"role": turn.role, "content": turn.text} for turn in turns]
    if held and others:
        raise SampleError(
            "bad_field",
            f"{where}: media in messages and in another column, got {others[0].column}, expected "
            f"them in one place; leave one out, e.g. columns: {{{IGNORE}: {others[0].column}}}",
        )
    (column,) = [each for each in rules.of("messages") if row_value(row, each) is not None]
    return [_medium(where, kind, column, index, value) for index, (kind, value) in enumerate(held)]


def row_value(row: Mapping[str, Any], column: str) -> Any:
    """Return what a column holds, `None` if it is missing; a dot leads into an object."""
    value: Any = row
    for name in [column] if column in row else column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def row_paths(row: Mapping[str, object]) -> Iterator[str]:
    """Yield the names in a row, and those in its objects with dots."""
    for name, value in row.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in row_paths(value))


def cell_values(cell: Any) -> Sequence[Any]:
    """Return the media of a column that may hold one, a list or messages."""
    if not isinstance(cell, list | tuple):
        return [cell]
    if cell and isinstance(cell[0], Mapping) and "role" in cell[0]:
        return [value for _, value in read_messages("", cell)[1]]
    return cell


def content_of(value: Any) -> bytes | None:
    """Return the bytes that a row holds of a medium, `None` if it names a file.

    Raises:
        ValueError: It is no base64.
    """
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes | bytearray):
        return bytes(content)
    if not isinstance(content, str) or not holds_content(value):
        return None
    url = _DATA_URL.match(content)
    return base64.b64decode(re.sub(r"\s", "", content[url.end() if url else 0 :]), validate=True)


def holds_content(value: Any) -> bool:
    """Return whether a row holds a medium itself: bytes, base64 or a data URL."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes | bytearray | Held):
        return True
    if not isinstance(content, str):
        return False
    is_base64 = len(content) >= MIN_BASE64 and _BASE64.fullmatch(content) is not None
    return _DATA_URL.match(content) is not None or is_base64


def path_of(value: Any) -> str | None:
    """Return the path that a row has for a medium, `None` if it has none."""
    path = value.get("path") if isinstance(value, Mapping) else value
    return path if isinstance(path, str) and path else None


def check_names(path: object, names: Iterable[str]) -> None:
    """Refuse a column name that is there twice: only one of the columns would be read. Spreadsheets
    end in columns without a name.

    Raises:
        DataError: One is.
    """
    twice = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if twice:
        raise DataError(
            f"{path}: two columns have one name, got {twice[0]!a}, expected every name once; "
            "rename one"
        )


def _one_value(where: str, row: Mapping[str, Any], rules: RowRules, part: str) -> Any:
    values = [row_value(row, column) for column in rules.of(part)]
    found = [value for value in values if value is not None and value == value]
    if len(found) > 1:
        got = f"got columns {', '.join(rules.of(part))}"
        raise SampleError(
            "bad_field", f"{where}: two values for {part}, {got}, expected one; name one column"
        )
    return found[0] if found else None


def _as_text(value: Any) -> Any:
    """Return a number as text, as tables often have ids and answers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and math.isfinite(value) else value


def as_json(where: str, value: Any) -> Any:
    """Return metadata as JSON has it: times as ISO 8601, decimals as numbers.

    Raises:
        SampleError: It has something else, such as bytes.
    """
    try:
        return json.loads(json.dumps(value, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(
            "bad_field",
            f"{where}: field metadata is no JSON value, got {error}, expected texts, numbers, "
            "times, lists and objects; leave the rest out",
        ) from error


def _plain(value: Any) -> str | float:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError("bytes" if isinstance(value, Held) else type(value).__name__)


def _is_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(entry is None for entry in value.values())
    return value is None or (isinstance(value, str) and not value)


def _medium(where: str, kind: MediaKind | None, column: str, index: int, value: Any) -> Medium:
    path = path_of(value)
    if holds_content(value):
        return Medium(kind or _kind_of(value, path), column, index, value, _ending(value, path))
    if path is None:
        expected = "expected a path, bytes, a data URL, or an object with bytes or path"
        raise SampleError(
            "bad_field",
            f"{where}: column {column} holds no medium, got {type(value).__name__}, {expected}; "
            f"correct it, or leave it out with columns: {{{IGNORE}: {column}}}",
        )
    if _ADDRESS.match(path):
        raise SampleError(
            "bad_field",
            f"{where}: column {column} has an address, got {shown(path)}, expected a path below "
            "the media root; download the file",
        )
    ending = _path_ending(path)
    known = kind or media_kind(ending)
    if known is None:
        raise SampleError(
            "unknown_media",
            f"{where}: unknown kind of media, got {path!r:.200}, expected e.g. .jpg, .png, .mp4; "
            "convert the file",
        )
    return Medium(known, column, index, value, ending)


def _kind_of(value: Any, path: str | None) -> MediaKind:
    return media_kind(_ending(value, path)) or "image"


def _ending(value: Any, path: str | None) -> str:
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, str):
        url = _DATA_URL.match(content)
        kind = (url[1] or "").lower() if url else ""
        return _MIME_ENDINGS.get(kind, kind)
    return _path_ending(path) if path is not None else ""


def _path_ending(path: str) -> str:
    return PurePosixPath(path).suffix[1:].lower()


def _check_all_read(where: str, row: Mapping[str, Any], rules: RowRules, has_media: bool) -> None:
    unread = unmapped_media(row, rules.read(), has_media)
    if unread:
        raise unread_media(where, unread)


def unread_media(where: str, columns: Sequence[str]) -> SampleError:
    """Return the error of media in columns that no part of a question is read from."""
    names = ", ".join(columns)
    hint = f"name them: columns: {{image: {','.join(columns)}}}, or leave them out: {{{IGNORE}: …}}"
    return SampleError(
        "unmapped_media",
        f"{where}: media in columns that are not read, got {names}, expected a part of the "
        f"question; {hint}",
    )

"""The rules of one sample: what KEY.json must hold and which files it names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import SampleError
from data.json_text import TEXT_RULE, load_object
from data.media_columns import check_markers, unmapped_media
from data.question import ANSWER_TYPES, AnswerType, MediaKind, MediaRef, Question
from data.text import is_valid_text

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
VIDEO_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "webm", "mkv", "avi", "gif"})
MAX_CHOICES = 26
FIELDS = ("id", "question", "answer", "answer_type", "choices", "source", "media")
REASONS = (
    "bad_json",
    "bad_text",
    "bad_field",
    "unknown_answer_type",
    "bad_choice",
    "missing_media",
    "unknown_media",
    "unmapped_media",
    "missing_json",
)


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample on its way into a shard.

    Attributes:
        key: Name inside the shard, without dots.
        question: Fields of KEY.json.
        media: `(extension, content)` of every media file, e.g. `("jpg", …)` or `("0.jpg", …), ("1.mp4", …)`.
    """

    key: str
    question: Mapping[str, Any]
    media: Sequence[tuple[str, bytes]] = ()


def media_kind(extension: str) -> MediaKind | None:
    """Return what a member is by the last part of its extension, `None` if it is no media file."""
    last = extension.rpartition(".")[2]
    if last in IMAGE_EXTENSIONS:
        return "image"
    return "video" if last in VIDEO_EXTENSIONS else None


def media_order(extensions: Iterable[str]) -> list[str]:
    """Return the media members of a sample in the order 0.jpg, 1.jpg, …, 10.jpg; those without a number first."""

    def by_number(extension: str) -> tuple[int, str]:
        number = re.match(r"(\d+)\.", extension)
        return (int(number[1]) if number else -1, extension)

    return sorted((extension for extension in extensions if media_kind(extension)), key=by_number)


def parse_question(shard: str, key: str, content: bytes, extensions: Iterable[str]) -> Question:
    """Build the question of one sample.

    Args:
        shard: Path of the shard, kept in the media references.
        key: Sample key.
        content: Bytes of KEY.json.
        extensions: Members of the sample, e.g. `("json", "0.jpg", "1.jpg")`.

    Raises:
        SampleError: A rule is broken; its `reason` says which.
    """
    where = f"{shard}:{key}"
    if not is_valid_text(key):
        raise SampleError("bad_text", f"{where!a}: the key is no valid text, got {key!a}, {TEXT_RULE}; rename it")
    fields = load_object(where, content)
    answer_type = _answer_type(where, fields)
    choices = _choices(where, fields, answer_type)
    question = Question(
        id=_text(where, fields, "id"),
        text=_text(where, fields, "question"),
        media=_media(where, shard, key, fields, tuple(extensions)),
        answer=_text(where, fields, "answer"),
        answer_type=answer_type,
        choices=choices,
        source=_text(where, fields, "source", optional=True),
    )
    if not question.media:
        check_fields(where, fields, has_media=False)
    check_markers(where, [question.text, *choices], question.media)
    return question


def check_fields(where: str, fields: Mapping[str, Any], *, has_media: bool) -> None:
    """Refuse a question with media in a field that is not read.

    Args:
        where: Place of the question.
        fields: All fields.
        has_media: The field `media` gives some.

    Raises:
        SampleError: `unmapped_media`.
    """
    unread = unmapped_media(fields, FIELDS, has_media)
    if unread:
        got = f"got {', '.join(unread)}"
        raise SampleError("unmapped_media", f"{where}: media in a field that is not read, {got}, expected them in media; move or remove it")


def _text(where: str, fields: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    value = fields.get(name, "" if optional else None)
    if isinstance(value, str) and (value.strip() or optional):
        return value
    raise SampleError("bad_field", f"{where}: field {name} is wrong, got {value!r}, expected a text that is not empty; correct it")


def _answer_type(where: str, fields: Mapping[str, Any]) -> AnswerType:
    value = fields.get("answer_type")
    for answer_type in ANSWER_TYPES:
        if value == answer_type:
            return answer_type
    expected = ", ".join(ANSWER_TYPES)
    raise SampleError("unknown_answer_type", f"{where}: unknown answer_type, got {value!r}, expected one of {expected}; correct it")


def _text_list(where: str, fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name, [])
    if isinstance(value, list) and all(isinstance(entry, str) and entry.strip() for entry in value):
        return tuple(value)
    raise SampleError("bad_field", f"{where}: field {name} is wrong, got {value!r}, expected a list of texts; correct it")


def _choices(where: str, fields: Mapping[str, Any], answer_type: AnswerType) -> tuple[str, ...]:
    choices = _text_list(where, fields, "choices")
    if answer_type != "choice":
        if choices:
            raise SampleError("bad_choice", f"{where}: choices given, got answer_type {answer_type}, expected choice; change one of them")
        return ()
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise SampleError("bad_choice", f"{where}: wrong number of choices, got {len(choices)}, expected 2 to {MAX_CHOICES}; correct it")
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    if fields.get("answer") not in letters:
        got = fields.get("answer")
        raise SampleError("bad_choice", f"{where}: the answer is no letter, got {got!r}, expected A to {letters[-1]}; correct it")
    return choices


def _media(where: str, shard: str, key: str, fields: Mapping[str, Any], extensions: tuple[str, ...]) -> tuple[MediaRef, ...]:
    named = _text_list(where, fields, "media") if "media" in fields else tuple(media_order(extensions))
    references = []
    for extension in named:
        kind = media_kind(extension)
        if kind is None:
            known = ", ".join(sorted(IMAGE_EXTENSIONS | VIDEO_EXTENSIONS))
            raise SampleError("unknown_media", f"{where}: unknown kind of media, got {extension}, expected {known}; convert the file")
        if extension not in extensions:
            have = ", ".join(extensions)
            raise SampleError("missing_media", f"{where}: media file is missing, got members {have}, expected {extension}; add it")
        references.append(MediaRef(kind=kind, shard=shard, key=key, extension=extension))
    return tuple(references)

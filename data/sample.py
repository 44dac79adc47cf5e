"""The rules of one sample: what KEY.json must hold and which files it names."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.choices import named_options, option_letters
from data.errors import SampleError, shown
from data.json_text import load_object
from data.media_columns import unmapped_media
from data.messages import in_text_order, read_messages
from data.question import ANSWER_TYPES, AnswerType, MediaKind, MediaRef, Question, Turn

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
VIDEO_EXTENSIONS = frozenset({"mp4", "m4v", "mov", "webm", "mkv", "avi", "gif"})
_UNOPENED = """
    tif tiff heic heif avif jxl jp2 j2k jfif jpe svg ico ppm pgm pbm pnm tga psd exr hdr
    eps pdf img image picture photo mpg mpeg m2v mts m2ts ts 3gp 3g2 ogv ogg wmv asf flv
    vob rm video mp3 wav flac m4a aac opus wma audio
"""
UNOPENED_EXTENSIONS = frozenset(_UNOPENED.split())
"""Of pictures, videos and sounds in formats that are not opened."""
MAX_CHOICES = 26
FIELDS = ("id", "question", "messages", "answer", "answer_type", "choices", "source", "media")
MAX_MEDIA = 1000
MAX_METADATA_CHARS = 1 << 16
"""The replay buffer and its checkpoints hold them."""
PARTS = re.compile(r"([0-9]+)|([^0-9]+)")
UNUSABLE_KEY = re.compile(
    "[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\\A/|(?:\\A|/)\\.\\.(?:/|\\Z)"
)
REASONS = (
    "bad_key",
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
        media: `(extension, content)` of every media file, e.g. `("jpg", …)` or `("0.jpg", …),
            ("1.mp4", …)`.
    """

    key: str
    question: Mapping[str, Any]
    media: Sequence[tuple[str, bytes]] = ()


def media_kind(extension: str) -> MediaKind | None:
    """Return the kind of a media file by the last part of its extension, `None` for others."""
    last = extension.rpartition(".")[2]
    if last in IMAGE_EXTENSIONS:
        return "image"
    return "video" if last in VIDEO_EXTENSIONS else None


def media_order(extensions: Iterable[str]) -> list[str]:
    """Return the media members of a sample in natural order.

    Those without a number come first, then img2.jpg before img10.jpg.
    """

    def natural(extension: str) -> tuple[bool, list[tuple[int, int, str]], str]:
        stem = extension.rpartition(".")[0]
        parts: list[tuple[int, int, str]] = []
        for number, text in PARTS.findall(stem):
            digits = number.lstrip("0")
            # A number may have thousands of digits: more of them is more, then they compare as
            # text.
            parts.append((0, len(digits), digits) if number else (1, 0, text))
        return any(kind == 0 for kind, _, _ in parts), parts, extension

    return sorted((extension for extension in extensions if media_kind(extension)), key=natural)


def is_usable_key(key: str) -> bool:
    """Return whether a key can be used in transcripts, logs and paths.

    It has no control characters, no bytes that are not UTF-8, and does not lead upwards.
    """
    return UNUSABLE_KEY.search(key) is None


def parse_question(
    shard: str,
    key: str,
    content: bytes,
    extensions: Iterable[str],
    answer_types: Collection[str] = ANSWER_TYPES,
) -> Question:
    """Build the question of one sample.

    Args:
        shard: Path of the shard, kept in the media references.
        key: Sample key.
        content: Bytes of KEY.json.
        extensions: Members of the sample, e.g. `("json", "0.jpg", "1.jpg")`.
        answer_types: Those that can be graded.

    Raises:
        SampleError: A rule is broken; its `reason` says which.
    """
    where = f"{shard}:{shown(key)}"
    if not is_usable_key(key):
        expected = "expected printable UTF-8 without leading / or .."
        raise SampleError("bad_key", f"{where}: key is not allowed, {expected}; rename it")
    fields = load_object(where, content)
    media = _media(where, shard, key, fields, dict.fromkeys(extensions))
    return make_question(where, fields, media, answer_types)


def make_question(
    where: str,
    fields: Mapping[str, Any],
    media: tuple[MediaRef, ...],
    answer_types: Collection[str] = ANSWER_TYPES,
) -> Question:
    """Build a question of the fields of KEY.json, wherever they were read.

    Args:
        where: File and key, for messages.
        fields: All fields; `media` is not looked at.
        media: Images and videos; the prompt shows them in this order where no text places them.
        answer_types: Those that can be graded.

    Raises:
        SampleError: A rule is broken; its `reason` says which.
    """
    answer_type = _answer_type(where, fields, answer_types)
    choices = _choices(where, fields, answer_type)
    answer = _text(where, fields, "answer")
    *earlier, last = _turns(where, fields)
    texts = [*(turn.text for turn in earlier), last.text, *choices]
    question = Question(
        id=_text(where, fields, "id"),
        text=last.text,
        media=in_text_order(where, texts, media),
        answer=_right_letter(where, answer, choices) if choices else answer,
        answer_type=answer_type,
        choices=choices,
        source=_text(where, fields, "source", optional=True),
        metadata=_metadata(where, fields),
        earlier=tuple(earlier),
    )
    if not question.media:
        check_fields(where, fields, has_media=False)
    return question


def check_fields(where: str, fields: Mapping[str, Any], *, has_media: bool) -> None:
    """Refuse a question with media in a field that is not read.

    Args:
        where: Shard and key, for messages.
        fields: All fields.
        has_media: The field `media` gives some.

    Raises:
        SampleError: `unmapped_media`.
    """
    unread = unmapped_media(fields, FIELDS, has_media)
    if unread:
        got = f"got {', '.join(unread)}"
        raise SampleError(
            "unmapped_media",
            f"{where}: media in a field that is not read, {got}, expected them in media; move or "
            "remove it",
        )


def _text(where: str, fields: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    value = fields.get(name, "" if optional else None)
    if isinstance(value, str) and (value.strip() or optional):
        return value
    raise SampleError(
        "bad_field",
        f"{where}: field {name} is wrong, got {reprlib.repr(value)}, expected a text that is not "
        "empty; correct it",
    )


def _turns(where: str, fields: Mapping[str, Any]) -> tuple[Turn, ...]:
    """Return the messages, the question last."""
    if isinstance(fields.get("question"), list | tuple):
        got = reprlib.repr(fields["question"])
        raise SampleError(
            "bad_field",
            f"{where}: field question is a list, got {got}, expected a text; give a conversation "
            "as messages, of a table with columns: {messages: COLUMN}",
        )
    if fields.get("messages") is None:
        return (Turn("user", _text(where, fields, "question")),)
    if fields.get("question") is not None:
        raise SampleError(
            "bad_field",
            f"{where}: two fields say what is asked, got question and messages, expected one; "
            "remove the other, or leave its column out with columns: {ignore: …}",
        )
    turns, media = read_messages(where, fields["messages"])
    if media:
        raise SampleError(
            "bad_field",
            f"{where}: a part of messages holds a medium, got {reprlib.repr(media[0][1])}, "
            'expected {"type": "image"} alone; a shard has files beside KEY.json and their order '
            "in media",
        )
    return turns


def _answer_type(
    where: str, fields: Mapping[str, Any], answer_types: Collection[str]
) -> AnswerType:
    value = fields.get("answer_type")
    if isinstance(value, str) and value in answer_types:
        return value
    raise SampleError(
        "unknown_answer_type",
        f"{where}: unknown answer_type, got {reprlib.repr(value)}, expected one of "
        f"{', '.join(answer_types)}; correct it, or give reward.functions one for it",
    )


def _metadata(where: str, fields: Mapping[str, Any]) -> str:
    """Return the field `metadata`, any JSON value, as text."""
    value = fields.get("metadata")
    text = "" if value is None else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_METADATA_CHARS:
        return text
    raise SampleError(
        "bad_field",
        f"{where}: field metadata is too long, got {len(text)} characters of JSON, expected at "
        f"most {MAX_METADATA_CHARS}; leave out what the reward does not need",
    )


def _text_list(where: str, fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name, [])
    if isinstance(value, list) and all(isinstance(entry, str) and entry.strip() for entry in value):
        return tuple(value)
    raise SampleError(
        "bad_field",
        f"{where}: field {name} is wrong, got {reprlib.repr(value)}, expected a list of texts; "
        "correct it",
    )


def _choices(where: str, fields: Mapping[str, Any], answer_type: AnswerType) -> tuple[str, ...]:
    choices = _text_list(where, fields, "choices")
    if answer_type != "choice":
        if choices:
            raise SampleError(
                "bad_choice",
                f"{where}: choices given, got answer_type {answer_type}, expected choice; change "
                "one of them",
            )
        return ()
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise SampleError(
            "bad_choice",
            f"{where}: wrong number of choices, got {len(choices)}, expected 2 to {MAX_CHOICES}; "
            "correct it",
        )
    return choices


def _right_letter(where: str, answer: str, choices: Sequence[str]) -> str:
    """Return the letter of the right option.

    Raises:
        SampleError: The answer names no option, or more than one.
    """
    named = named_options(answer, choices, "letter")
    if len(named) == 1:
        return named[0]
    got = f"got {reprlib.repr(answer)}, which names {' and '.join(named) or 'no option'}"
    raise SampleError(
        "bad_choice",
        f"{where}: the answer is not an option, {got}, expected A to "
        f"{option_letters(len(choices))[-1]}; correct it",
    )


def _media(
    where: str, shard: str, key: str, fields: Mapping[str, Any], extensions: Mapping[str, None]
) -> tuple[MediaRef, ...]:
    if "media" in fields:
        named = tuple(extension.lower() for extension in _text_list(where, fields, "media"))
    else:  # one that is not opened is refused below: without it this would be another question
        named = (
            *media_order(extensions),
            *(each for each in extensions if each.rpartition(".")[2] in UNOPENED_EXTENSIONS),
        )
    if len(named) > MAX_MEDIA:
        got = f"got {len(named)}, expected at most {MAX_MEDIA}"
        raise SampleError("bad_field", f"{where}: too many media files, {got}; leave some out")
    references = []
    for extension in named:
        kind = media_kind(extension)
        if kind is None:
            known = ", ".join(sorted(IMAGE_EXTENSIONS | VIDEO_EXTENSIONS))
            advice = "convert the file, or name the others in media"
            raise SampleError(
                "unknown_media",
                f"{where}: unknown kind of media, got {shown(extension)}, expected {known}; "
                f"{advice}",
            )
        if extension not in extensions:
            got = f"got members {shown(', '.join(extensions))}, expected {shown(extension)}"
            raise SampleError("missing_media", f"{where}: media file is missing, {got}; add it")
        references.append(MediaRef(kind=kind, shard=shard, key=key, extension=extension))
    return tuple(references)

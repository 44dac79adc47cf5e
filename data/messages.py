"""Conversations: earlier messages before the question, and media anywhere in their texts.

A text names its media by `<image>` and `<video>`, each time the next one of its kind. In backticks
the marker is text, and so is `<image 2>`, which refers to a picture and does not place it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from data.errors import SampleError
from data.question import MediaKind, MediaRef, Question, Role, Turn

MARKER = re.compile(r"`<(?:image|video)[ _]?\d*>`|<(image|video)[ _]?(\d{0,9})>")
"""In backticks it is text about the marker, and has no groups."""
KINDS: tuple[MediaKind, ...] = ("image", "video")
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_VALUES = ("path", "url", "base64")
_PART_FORMS = (
    '{"type": "text", "text": …} or {"type": "image"}, also "video", with its path or content '
    "under its type, path, url or base64"
)

Part: TypeAlias = str | int
"""Text, or the index of a medium."""


def placed(turns: Sequence[Turn], kinds: Sequence[MediaKind]) -> list[tuple[Role, list[Part]]]:
    """Return roles and parts of messages with their media where the texts have them; if no text
    names one, all are in front of the first message of the user.

    Args:
        turns: Oldest first.
        kinds: Of all media, in the order of the texts.

    Raises:
        SampleError: The texts name other media.
    """
    named = [kind for turn in turns for kind in kinds_named(turn.text)] if kinds else []
    if named and named != list(kinds):
        raise SampleError(
            "missing_media",
            f"messages: their texts do not fit the media, got {named}, expected {list(kinds)}; "
            "correct the markers",
        )
    first = [turn.role for turn in turns].index("user")
    messages: list[tuple[Role, list[Part]]] = []
    num_placed = 0
    for index, turn in enumerate(turns):
        parts: list[Part] = [turn.text]
        if named:
            parts = _cut(turn.text, num_placed)
            num_placed += sum(isinstance(part, int) for part in parts)
        elif index == first:
            parts = [*range(len(kinds)), turn.text]
        messages.append((turn.role, parts))
    return messages


def kinds_named(text: str) -> list[MediaKind]:
    """Return the kinds of the media that a text places."""
    return [kind for _, kind in _markers(text)]


def in_text_order(
    where: str, texts: Sequence[str], media: Sequence[MediaRef]
) -> tuple[MediaRef, ...]:
    """Return media in the order in which the texts name them; as they are if none does.

    Raises:
        SampleError: `missing_media`: `<image>` and `<video>` are there but not as many as the media
            of the kind, or `<image 2>` has none.
    """
    named = [kind for text in texts for kind in kinds_named(text)]
    found = [match for text in texts for match in MARKER.finditer(text)]
    for kind in KINDS:
        have = sum(reference.kind == kind for reference in media)
        count = named.count(kind)
        # Some count from 0.
        numbers = [max(int(match[2]), 1) for match in found if match[1] == kind and match[2]]
        highest = max(numbers, default=0)
        is_wrong = bool(named) and count != have
        if is_wrong or highest > have:
            got = f"got {count} times <{kind}>" if is_wrong else f"got <{kind} {highest}>"
            expected = (
                "expected as many; add or name the media, or set the marker in backticks where it "
                "is text"
            )
            raise SampleError(
                "missing_media",
                f"{where}: the text does not fit its media, {got} and {have} of kind {kind}, "
                f"{expected}",
            )
    if not named:
        return tuple(media)
    rest = {kind: iter([each for each in media if each.kind == kind]) for kind in KINDS}
    return tuple(next(rest[kind]) for kind in named)


def read_messages(where: str, value: Any) -> tuple[tuple[Turn, ...], list[tuple[MediaKind, Any]]]:
    """Return the turns of a conversation, the last one of the user, and the media that its parts
    hold or name, in their order.

    Args:
        where: File and key, for messages.
        value: `[{"role", "content"}, …]`; a content is a text, or a list of typed parts as Hugging
            Face chat templates have them, which become text with markers.

    Raises:
        SampleError: `bad_field`.
    """
    if not isinstance(value, list | tuple) or not value:
        raise _wrong(where, value, 'a list of {"role": …, "content": …}')
    media: list[tuple[MediaKind, Any]] = []
    turns = [_turn(f"{where}: message {number}", each, media) for number, each in enumerate(value)]
    roles = [turn.role for turn in turns]
    if roles[-1] != "user" or "system" in roles[1:]:
        raise _wrong(
            where,
            roles,
            "at most one message of the system, the first, and the last of the user; the answer "
            "belongs into answer",
        )
    if roles[0] == "system" and kinds_named(turns[0].text):
        raise _wrong(where, turns[0].text, "media in messages of user and assistant alone")
    return tuple(turns), media


def whole_text(question: Question) -> str:
    """Return all that is asked as one text, with the roles if there are earlier messages."""
    text = question.text.strip()
    if not question.earlier:
        return text
    turns = [*question.earlier, Turn("user", text)]
    return "\n\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def _markers(text: str) -> Iterable[tuple[re.Match[str], MediaKind]]:
    for match in MARKER.finditer(text):
        if match[1] and not match[2]:
            yield match, "image" if match[1] == "image" else "video"


def _cut(text: str, first: int) -> list[Part]:
    """Cut a text at its markers, the first of which is that of medium `first`."""
    parts: list[Part] = []
    position = 0
    for index, (match, _) in enumerate(_markers(text), first):
        parts += [text[position : match.start()], index]
        position = match.end()
    return [part for part in (*parts, text[position:]) if part != ""]


def _turn(where: str, message: Any, media: list[tuple[MediaKind, Any]]) -> Turn:
    if not isinstance(message, Mapping):
        raise _wrong(where, message, '{"role": …, "content": …}')
    given = {name for name, value in message.items() if value not in (None, [], "")}
    role, content = message.get("role"), message.get("content")
    if given - {"role", "content"}:
        raise _wrong(where, sorted(given), "role and content alone")
    known: Role | None = next((each for each in ROLES if each == role), None)
    if known is None:
        raise _wrong(where, role, f"a role of {', '.join(ROLES)}")
    if isinstance(content, list | tuple):
        text = "".join(_part(where, part, media) for part in content)
    elif isinstance(content, str):
        text = content
    else:
        raise _wrong(where, content, "a text or a list of parts as content")
    if not text.strip():
        raise _wrong(where, content, "a content that is not empty")
    return Turn(known, text)


def _part(where: str, part: Any, media: list[tuple[MediaKind, Any]]) -> str:
    """Return a part as text; what it holds of a medium is added to the others."""
    fields = dict(part) if isinstance(part, Mapping) else {}
    named = str(fields.pop("type", "")).removesuffix("_url")
    # Columns of objects have all names in every part.
    given = {name: value for name, value in fields.items() if value is not None and value != ""}
    kind: MediaKind | None = next((each for each in KINDS if each == named), None)
    if kind is not None and len(given) <= 1 and not given.keys() - {kind, f"{kind}_url", *_VALUES}:
        for value in given.values():
            is_url = isinstance(value, Mapping) and "url" in value
            media.append((kind, value["url"] if is_url else value))
        return f"<{kind}>"
    text = given.get("text", "")
    if named != "text" or given.keys() - {"text"} or not isinstance(text, str):
        raise _wrong(where, part, _PART_FORMS)
    if kinds_named(text):
        raise _wrong(
            where,
            text,
            "no marker in a text beside other parts; write media as parts, and set the marker in "
            "backticks where it is text",
        )
    return text


def _wrong(where: str, got: Any, expected: str) -> SampleError:
    return SampleError(
        "bad_field",
        f"{where}: field messages is wrong, got {reprlib.repr(got)}, expected {expected}; correct "
        "it",
    )

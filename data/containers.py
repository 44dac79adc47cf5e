"""Recognise a video container by its first bytes and read the frame size from its headers, before any decoder sees it.

Only what is recognised here reaches a decoder: playlists and session descriptions, which make decoders open other files and
addresses, are not. The size is read from the headers because a decoder allocates before it can be asked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from data.errors import MediaError

MAX_ELEMENTS = 20_000  # boxes looked at in one file; a forged file may hold millions
EBML_MAGIC = b"\x1a\x45\xdf\xa3"
EBML_SEGMENT, EBML_CLUSTER, EBML_TRACKS, EBML_TRACK, EBML_VIDEO = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xE0
EBML_DOCTYPE, EBML_WIDTH, EBML_HEIGHT = 0x4282, 0xB0, 0xBA


@dataclass(frozen=True, slots=True)
class Container:
    """A recognised video file: name of its container, frame width and height in pixels as its headers state them."""

    name: str
    width: int
    height: int


def recognise(content: bytes) -> Container:
    """Return the container of a video.

    Raises:
        MediaError: `unsupported_container`, `truncated` (the file ends before its structure does) or `unreadable`.
    """
    try:
        if content[4:8] == b"ftyp" and content[:1] == b"\0":
            return Container("mp4", *_mp4_size(content))
        if content[:4] == EBML_MAGIC:
            return Container("webm", *_ebml_size(content))
        if content[:4] == b"RIFF" and content[8:12] == b"AVI ":
            return Container("avi", *_avi_size(content))
        if content[:6] in (b"GIF87a", b"GIF89a"):
            if b"\x3b" not in content[-16:]:
                raise _truncated("gif", "it has no trailer")
            return Container("gif", *struct.unpack_from("<HH", content, 6))
    except (struct.error, IndexError) as error:
        raise _truncated("video", f"a header is cut off ({error})") from error
    raise MediaError(
        "unsupported_container",
        f"video: container not recognised, got first bytes {content[:12]!r}, expected mp4/mov, webm/mkv, avi or gif; convert the file",
    )


def _truncated(name: str, detail: str) -> MediaError:
    return MediaError("truncated", f"{name}: the file is cut off: {detail}; copy it anew")


def _unreadable(name: str, detail: str) -> MediaError:
    return MediaError("unreadable", f"{name}: {detail}; convert or remove the file")


def _boxes(content: bytes, start: int, end: int, *, top: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start of content, end) of the boxes of an mp4 file or box."""
    for _ in range(MAX_ELEMENTS):
        if start + 8 > end:
            if top and start < end:
                raise _truncated("mp4", f"{end - start} bytes are left, expected a box")
            return
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", content, start + 8)[0], 16
        elif size == 0:
            size = end - start
        if size < head:
            raise _unreadable("mp4", f"box {kind!r} has size {size}, expected at least {head}")
        if start + size > end:
            raise _truncated("mp4", f"box {kind!r} ends at byte {start + size}, got {end} bytes")
        yield kind, start + head, start + size
        start += size
    raise _unreadable("mp4", f"more than {MAX_ELEMENTS} boxes side by side")


def _mp4_size(content: bytes) -> tuple[int, int]:
    top = list(_boxes(content, 0, len(content), top=True))
    moov = [(start, end) for kind, start, end in top if kind == b"moov"]
    if not moov:
        raise _truncated("mp4", "it has no moov box")
    sizes = []
    for kind, start, end in _boxes(content, *moov[0]):
        if kind == b"trak":
            sizes += _track_sizes(content, start, end)
    if not sizes:
        raise _unreadable("mp4", "no video track")
    return max(sizes, key=lambda size: size[0] * size[1])


def _track_sizes(content: bytes, start: int, end: int) -> list[tuple[int, int]]:
    """Return the frame sizes in the sample descriptions of a track, none for a track of another kind."""
    spans = {b"trak": (start, end)}
    handler = b""
    for parent, wanted in ((b"trak", b"mdia"), (b"mdia", b"minf"), (b"minf", b"stbl"), (b"stbl", b"stsd")):
        if parent not in spans:
            return []
        for kind, inner, inner_end in _boxes(content, *spans[parent]):
            if kind == b"hdlr" and parent == b"mdia":
                handler = content[inner + 8 : inner + 12]
            elif kind == wanted:
                spans[kind] = (inner, inner_end)
    if handler != b"vide" or b"stsd" not in spans:
        return []
    entries_start, entries_end = spans[b"stsd"]
    return [struct.unpack_from(">HH", content, inner + 24) for _, inner, _ in _boxes(content, entries_start + 8, entries_end)]


def _elements(content: bytes, start: int, end: int, *, top: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yield (id, start of content, end) of EBML elements; an element of unknown size reaches to the end."""
    for _ in range(MAX_ELEMENTS):
        if start >= end:
            return
        id_length = 9 - content[start].bit_length()
        if id_length > 4:
            raise _unreadable("webm", f"no element at byte {start}")
        element = int.from_bytes(content[start : start + id_length])
        start += id_length
        size_length = 9 - content[start].bit_length()
        if size_length > 8:
            raise _unreadable("webm", f"no element size at byte {start}")
        size = int.from_bytes(content[start : start + size_length]) & ((1 << (7 * size_length)) - 1)
        unknown = size == (1 << (7 * size_length)) - 1
        start += size_length
        stop = end if unknown else start + size
        if stop > end:
            if top:
                raise _truncated("webm", f"an element ends at byte {stop}, got {end} bytes")
            stop = end
        yield element, start, stop
        start = stop
    raise _unreadable("webm", f"more than {MAX_ELEMENTS} elements side by side")


def _ebml_size(content: bytes) -> tuple[int, int]:
    top = list(_elements(content, 0, len(content), top=True))
    doctype = [content[start:end].rstrip(b"\0") for element, start, end in _elements(content, *top[0][1:]) if element == EBML_DOCTYPE]
    if not doctype or doctype[0] not in (b"webm", b"matroska"):
        raise _unreadable("webm", f"document type {doctype[0] if doctype else None!r}, expected webm or matroska")
    sizes = []
    for segment in (span for element, *span in top if element == EBML_SEGMENT):
        for element, start, end in _elements(content, *segment):
            if element == EBML_TRACKS:
                sizes += [_video_size(content, *track) for kind, *track in _elements(content, start, end) if kind == EBML_TRACK]
            if element == EBML_CLUSTER:
                break  # tracks come before the frames
    if not any(width * height for width, height in sizes):
        raise _unreadable("webm", "no video track")
    return max(sizes, key=lambda size: size[0] * size[1])


def _video_size(content: bytes, start: int, end: int) -> tuple[int, int]:
    size = {EBML_WIDTH: 0, EBML_HEIGHT: 0}
    for element, inner, inner_end in _elements(content, start, end):
        if element == EBML_VIDEO:
            for field, value, value_end in _elements(content, inner, inner_end):
                if field in size:
                    size[field] = int.from_bytes(content[value:value_end])
    return size[EBML_WIDTH], size[EBML_HEIGHT]


def _avi_size(content: bytes) -> tuple[int, int]:
    riff_end = 8 + int(struct.unpack_from("<I", content, 4)[0])
    if riff_end > len(content) + 1:  # writers count a padding byte or do not
        raise _truncated("avi", f"its data end at byte {riff_end}, got {len(content)} bytes")
    if content[12:16] != b"LIST" or content[20:28] != b"hdrlavih":
        raise _unreadable("avi", "no main header")
    width, height = struct.unpack_from("<II", content, 64)
    return int(width), int(height)

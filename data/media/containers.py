"""Recognise a video container by its first bytes and read the frame size from its headers, before
any decoder sees it.

Only what is recognised here reaches a decoder: playlists and session descriptions, which make
decoders open other files and addresses, are not. The size is read from the headers because a
decoder allocates before it can be asked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.errors import MediaError
from data.media.signatures import container_name

Matrix = tuple[int, int, int, int]
Patches = tuple[tuple[int, bytes], ...]
AS_STORED: Matrix = (1, 0, 0, 1)
MIRRORED: Matrix = (-1, 0, 0, 1)
# Parts of the largest number of a matrix, of which one part is what rounding an angle leaves.
MATRIX_NOISE = 64
MP4_AS_STORED = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
TKHD_MATRIX, MVHD_MATRIX = (40, 52), (36, 48)
"""Offsets of the matrix in header boxes of version 0 and 1."""
MAX_ELEMENTS = 20_000  # boxes read in one file; a forged file may hold millions
EBML_SEGMENT, EBML_CLUSTER, EBML_TRACKS, EBML_TRACK, EBML_VIDEO = (
    0x18538067,
    0x1F43B675,
    0x1654AE6B,
    0xAE,
    0xE0,
)
EBML_DOCTYPE, EBML_WIDTH, EBML_HEIGHT = 0x4282, 0xB0, 0xBA
EBML_PROJECTION, EBML_YAW, EBML_PITCH, EBML_ROLL = 0x7670, 0x7673, 0x7674, 0x7675


@dataclass(frozen=True, slots=True)
class Display:
    """How stored frames are turned and mirrored for display.

    The decoder turns frames by itself, but takes a mirrored frame for one that is turned; so its
    part is taken from the file.

    Attributes:
        matrix: `(a, b, c, d)`, each -1, 0 or 1: the stored pixel (x, y) is shown at (ax + cy, bx +
            dy).
        patches: Offsets in the file and the bytes that mean "as stored" there.
    """

    matrix: Matrix = AS_STORED
    patches: Patches = ()

    def clear(self, content: bytearray) -> None:
        """Patch the file so that it asks for its frames as stored."""
        for offset, as_stored in self.patches:
            content[offset : offset + len(as_stored)] = as_stored

    def apply(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return stored frames `[frames, height, width, 3]` as they are displayed."""
        a, b, c, d = self.matrix
        if a == 0:  # the stored rows are columns
            pixels = pixels.swapaxes(1, 2)
        horizontal, vertical = (a, d) if a else (c, b)
        return np.ascontiguousarray(pixels[:, ::vertical, ::horizontal])


@dataclass(frozen=True, slots=True)
class Container:
    """A recognised video file: name of its container, stored frame width and height in pixels as
    its headers state them.
    """

    name: str
    width: int
    height: int
    display: Display = Display()


@dataclass(frozen=True, slots=True)
class _Track:
    """One video track."""

    width: int
    height: int
    matrix: Matrix = AS_STORED
    patches: Patches = ()


def recognise(content: bytes | bytearray) -> Container:
    """Return the container of a video.

    Raises:
        MediaError: `unsupported_container`, `truncated` (the file ends before its structure does)
            or `unreadable`.
    """
    name = container_name(content)
    try:
        if name == "mp4":
            return _mp4(content)
        if name == "webm":
            return _webm(content)
        if name == "avi":
            return Container("avi", *_avi_size(content))
        if b"\x3b" not in content[-16:]:
            raise _truncated("gif", "it has no trailer")
        return Container("gif", *struct.unpack_from("<HH", content, 6))
    except (struct.error, IndexError) as error:
        raise _truncated("video", f"a header is cut off ({error})") from error


def _choose(name: str, tracks: list[_Track], movie: Matrix, patches: Patches) -> Container:
    """Return the container of the largest track; which one the decoder takes is up to it."""
    if not any(track.width * track.height for track in tracks):
        raise _unreadable(name, "no video track")
    if len({track.matrix for track in tracks}) > 1:
        raise _unreadable(name, "its video tracks are turned in different ways")
    largest = max(tracks, key=lambda track: track.width * track.height)
    patches = patches + tuple(patch for track in tracks for patch in track.patches)
    return Container(
        name, largest.width, largest.height, Display(_product(largest.matrix, movie), patches)
    )


def _product(first: Matrix, second: Matrix) -> Matrix:
    """Return what one matrix and then the other do."""
    a, b, c, d = first
    e, f, g, h = second
    return a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h


def _matrix(name: str, numbers: tuple[int, int, int, int]) -> Matrix:
    """Return a matrix of -1, 0 and 1; a scale means nothing to the stored pixels, and zeros alone
    mean nothing at all.
    """
    least = max(map(abs, numbers)) / MATRIX_NOISE
    a, b, c, d = ((number > least) - (number < -least) for number in numbers)
    if (a, b, c, d) == (0, 0, 0, 0):
        return AS_STORED
    if a * d - b * c not in (1, -1) or (a and b) or (c and d):
        got = ", ".join(f"{number / 65536:g}" for number in numbers)
        raise _unreadable(
            name,
            f"its display matrix turns by no right angle, got {got}, expected quarter turns and "
            "mirrors",
        )
    return a, b, c, d


def _truncated(name: str, detail: str) -> MediaError:
    return MediaError("truncated", f"{name}: the file is cut off: {detail}; copy it again")


def _unreadable(name: str, detail: str) -> MediaError:
    return MediaError("unreadable", f"{name}: {detail}; convert or remove the file")


def _boxes(
    content: bytes | bytearray, start: int, end: int, *, top: bool = False
) -> Iterator[tuple[bytes, int, int]]:
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


def _mp4(content: bytes | bytearray) -> Container:
    top = list(_boxes(content, 0, len(content), top=True))
    moov = [(start, end) for kind, start, end in top if kind == b"moov"]
    if not moov:
        raise _truncated("mp4", "it has no moov box")
    tracks = []
    movie: Matrix = AS_STORED
    patches: Patches = ()
    for kind, start, end in _boxes(content, *moov[0]):
        if kind == b"trak":
            tracks += _video_tracks(content, start, end)
        if kind == b"mvhd":
            movie, patches = _mp4_matrix(content, start, MVHD_MATRIX)
    return _choose("mp4", tracks, movie, patches)


def _mp4_matrix(
    content: bytes | bytearray, start: int, offsets: tuple[int, int]
) -> tuple[Matrix, Patches]:
    """Return the matrix of a header box and the patch that resets it."""
    offset = start + offsets[content[start] == 1]
    a, b, _, c, d = struct.unpack_from(">5i", content, offset)
    return _matrix("mp4", (a, b, c, d)), ((offset, MP4_AS_STORED),)


def _video_tracks(content: bytes | bytearray, start: int, end: int) -> list[_Track]:
    """Return a track once for every sample description, none if it is of another kind."""
    spans = {b"trak": (start, end)}
    handler: bytes | bytearray = b""
    for parent, wanted in (
        (b"trak", b"mdia"),
        (b"mdia", b"minf"),
        (b"minf", b"stbl"),
        (b"stbl", b"stsd"),
    ):
        if parent not in spans:
            return []
        for kind, inner, inner_end in _boxes(content, *spans[parent]):
            if kind == b"hdlr" and parent == b"mdia":
                handler = content[inner + 8 : inner + 12]
            elif kind in (wanted, b"tkhd"):
                spans[kind] = (inner, inner_end)
    if handler != b"vide" or b"stsd" not in spans:
        return []
    matrix, patches = (
        _mp4_matrix(content, spans[b"tkhd"][0], TKHD_MATRIX)
        if b"tkhd" in spans
        else (AS_STORED, ())
    )
    first, last = spans[b"stsd"]
    sizes = [
        struct.unpack_from(">HH", content, inner + 24)
        for _, inner, _ in _boxes(content, first + 8, last)
    ]
    return [_Track(width, height, matrix, patches) for width, height in sizes]


def _elements(
    content: bytes | bytearray, start: int, end: int, *, top: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield (id, start of content, end) of EBML elements; an element of unknown size reaches to the
    end.
    """
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


def _webm(content: bytes | bytearray) -> Container:
    top = list(_elements(content, 0, len(content), top=True))
    doctype = [
        content[start:end].rstrip(b"\0")
        for element, start, end in _elements(content, *top[0][1:])
        if element == EBML_DOCTYPE
    ]
    if not doctype or doctype[0] not in (b"webm", b"matroska"):
        raise _unreadable(
            "webm", f"document type {doctype[0] if doctype else None!r}, expected webm or matroska"
        )
    tracks = []
    for segment in (span for element, *span in top if element == EBML_SEGMENT):
        for element, start, end in _elements(content, *segment):
            if element == EBML_TRACKS:
                entries = (
                    span for kind, *span in _elements(content, start, end) if kind == EBML_TRACK
                )
                tracks += [
                    _webm_track(content, *span)
                    for entry in entries
                    for kind, *span in _elements(content, *entry)
                    if kind == EBML_VIDEO
                ]
            if element == EBML_CLUSTER:
                break  # tracks come before the frames
    return _choose("webm", tracks, AS_STORED, ())


def _webm_track(content: bytes | bytearray, start: int, end: int) -> _Track:
    """Return a track by its video settings."""
    size = {EBML_WIDTH: 0, EBML_HEIGHT: 0}
    pose = {EBML_YAW: 0.0, EBML_PITCH: 0.0, EBML_ROLL: 0.0}
    patches = []
    for element, inner, inner_end in _elements(content, start, end):
        if element in size:
            size[element] = int.from_bytes(content[inner:inner_end])
        for angle, first, last in (
            _elements(content, inner, inner_end) if element == EBML_PROJECTION else ()
        ):
            if angle in pose and last - first in (4, 8):
                (pose[angle],) = struct.unpack_from(
                    ">f" if last - first == 4 else ">d", content, first
                )
                patches.append((first, bytes(last - first)))
    return _Track(size[EBML_WIDTH], size[EBML_HEIGHT], _pose_matrix(*pose.values()), tuple(patches))


def _pose_matrix(yaw: float, pitch: float, roll: float) -> Matrix:
    """Return the matrix of a flat picture's pose, in degrees: a half turn of the head mirrors it,
    rolling turns it counter-clockwise.
    """
    quarters = roll / 90
    if yaw not in (0, 180, -180) or pitch != 0 or not quarters.is_integer():
        got = f"got yaw {yaw:g}, pitch {pitch:g}, roll {roll:g}"
        raise _unreadable(
            "webm", f"its pose turns by no right angle, {got}, expected quarter turns and mirrors"
        )
    turned = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[int(quarters) % 4]
    return _product(MIRRORED, turned) if yaw else turned


def _avi_size(content: bytes | bytearray) -> tuple[int, int]:
    riff_end = 8 + int(struct.unpack_from("<I", content, 4)[0])
    if riff_end > len(content) + 1:  # writers count a padding byte or do not
        raise _truncated("avi", f"its data end at byte {riff_end}, got {len(content)} bytes")
    if content[12:16] != b"LIST" or content[20:28] != b"hdrlavih":
        raise _unreadable("avi", "no main header")
    width, height = struct.unpack_from("<II", content, 64)
    return int(width), int(height)

"""What a media file is by its first bytes: the formats that are opened, and the names of others for
the message that refuses them.
"""

from __future__ import annotations

import re

from data.errors import MediaError
from data.question import MediaKind

IMAGE_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
"""File endings by Pillow's name of a format."""
EBML_MAGIC = b"\x1a\x45\xdf\xa3"
START_BYTES = 512
_STILL_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (rb"GIF8[79]a", "GIF, which is read as a video"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (rb"\0\0[\x01\x02]\0[^\0]", "an icon"),
    (rb"8BPS", "Photoshop"),
    (rb"%PDF", "PDF"),
    (rb"%!PS", "PostScript"),
    (rb"P[1-7]\s", "a Netpbm picture"),
    (rb"ID3|\xff[\xfb\xf3\xf2]|OggS|fLaC|RIFF....WAVE", "sound"),
    (rb"FLV\x01", "Flash video"),
    (rb"\0\0\x01[\xba\xb3]", "an MPEG program stream"),
    (rb"\x47.{187}\x47", "an MPEG transport stream"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\x1f\x8b", "a gzip archive"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (rb"#EXTM3U|v=0\r?\n|ffconcat", "a playlist"),
    (rb"(?is)\s*(<\?xml.*|<!--.*|<!doctype svg.*)?<svg\b", "SVG"),
    (rb"(?i)\s*(<!doctype html|<html)", "a web page, not a file; the download failed"),
    (rb"\0+\Z", "zeros only"),
)


def image_format(content: bytes | bytearray) -> str:
    """Return Pillow's name of an image format.

    Raises:
        MediaError: It is none of those that are opened.
    """
    start = bytes(content[:START_BYTES])
    if start[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:2] == b"BM":
        return "BMP"
    raise _unsupported("image", start, "JPEG, PNG, WebP or BMP")


def container_name(content: bytes | bytearray) -> str:
    """Return `mp4`, `webm`, `avi` or `gif`, which are also the endings of files.

    Raises:
        MediaError: It is none of those that are opened.
    """
    start = bytes(content[:START_BYTES])
    if start[4:8] == b"ftyp" and start[:1] == b"\0" and start[8:12] not in _STILL_BRANDS:
        return "mp4"
    if start[:4] == EBML_MAGIC:
        return "webm"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    raise _unsupported("video", start, "mp4/mov, webm/mkv, avi or gif")


def file_ending(kind: MediaKind, content: bytes) -> str:
    """Return the ending that a file of this content has by rights.

    Raises:
        MediaError: It is none of the formats that are opened.
    """
    return IMAGE_ENDINGS[image_format(content)] if kind == "image" else container_name(content)


def _unsupported(kind: MediaKind, start: bytes, expected: str) -> MediaError:
    got = _name(kind, start) or f"first bytes {start[:12]!r}"
    return MediaError(
        "unsupported_container",
        f"{kind}: format not supported, got {got}, expected {expected}; convert it",
    )


def _name(kind: MediaKind, start: bytes) -> str:
    """Return the name of a known format that is not opened as this kind; empty if it is not
    known.
    """
    if start[4:8] == b"ftyp":
        return _STILL_BRANDS.get(start[8:12], "a video (mp4)" if kind == "image" else "")
    if kind == "image" and (start[:4] == EBML_MAGIC or start[8:12] == b"AVI "):
        return "a video"
    if kind == "video":
        for magic, name in ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG", "PNG"), (b"BM", "BMP")):
            if start.startswith(magic):
                return f"an image ({name})"
        if start[8:12] == b"WEBP":
            return "an image (WebP)"
    return next((name for pattern, name in _OTHERS if re.match(pattern, start, re.DOTALL)), "")

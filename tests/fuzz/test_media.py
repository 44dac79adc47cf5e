"""Damaged and forged images and videos: an error with a reason or pixels within the limits, and
never more than one worker's life.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import MEDIA_REASONS, MediaError
from data.media.opening import MediaLimits, MediaOpener
from data.media.sampling import FrameSampling
from data.question import MediaKind
from tests.unit.test_data_video import encode, grey_frames

MAX_PIXELS = 4096
MAX_FRAMES = 4


def images() -> list[bytes]:
    """Return a small file of every format, with an orientation, in two colour modes."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 7
    files = []
    for image_format, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
    ):
        for shown in (picture, picture.convert("L")):
            file = io.BytesIO()
            shown.save(file, image_format, exif=exif, **options)
            files.append(file.getvalue())
    return files


def videos() -> list[bytes]:
    return [
        encode(grey_frames(8), container=container, codec=codec)
        for container, codec in (
            ("mp4", "libx264"),
            ("matroska", "libx264"),
            ("webm", "libvpx"),
            ("avi", "mpeg4"),
        )
    ]


FILES: dict[MediaKind, list[bytes]] = {"image": images(), "video": videos()}


@st.composite
def damaged(draw: st.DrawFn, kind: MediaKind) -> bytes:
    """A good file of which some bytes are others, some are missing, and some come twice; or bytes
    after a good start.
    """
    content = bytearray(draw(st.sampled_from(FILES[kind])))
    for _ in range(draw(st.integers(0, 6))):
        # Headers decide most, and lie at the start or, in mp4, at the end.
        offset = draw(st.integers(0, min(200, len(content) - 1)) | st.integers(0, len(content) - 1))
        match draw(st.sampled_from(("byte", "word", "cut", "repeat", "drop"))):
            case "byte":
                content[offset] = draw(st.integers(0, 255))
            case "word":
                content[offset : offset + 4] = draw(
                    st.sampled_from(
                        (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff")
                    )
                )
            case "cut":
                del content[max(offset, 16) :]
            case "repeat":
                content[offset:offset] = content[offset : offset + draw(st.integers(1, 64))]
            case "drop":
                del content[offset : offset + draw(st.integers(1, 8))]
        if not content:
            break
    return bytes(content)


@pytest.fixture(scope="module")
def opener() -> Iterator[MediaOpener]:
    made = MediaOpener(
        MediaLimits(
            max_bytes=100_000,
            max_pixels=MAX_PIXELS,
            sampling=FrameSampling(max_frames=MAX_FRAMES),
            decode_timeout_seconds=20,
        )
    )
    yield made
    made.close()


def check(opener: MediaOpener, kind: MediaKind, content: bytes, max_frames: int) -> None:
    reason = ""
    try:
        frames = opener.open(content, kind)
    except MediaError as error:
        reason = error.reason
        str(error).encode()
    if reason:
        assert reason in MEDIA_REASONS
        return
    count, height, width, channels = frames.pixels.shape
    assert 0 < count <= max_frames
    assert 0 < height * width <= MAX_PIXELS
    assert channels == 3
    assert len(frames.timestamps) == count
    assert list(frames.timestamps) == sorted(frames.timestamps)


@settings(deadline=None)
@given(content=damaged("image"))
def test_damaged_images(opener: MediaOpener, content: bytes) -> None:
    check(opener, "image", content, 1)


@settings(deadline=None)
@given(content=damaged("video"))
def test_damaged_videos(opener: MediaOpener, content: bytes) -> None:
    check(opener, "video", content, MAX_FRAMES)

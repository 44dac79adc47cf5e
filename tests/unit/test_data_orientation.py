"""All eight orientations of images and videos: turned, mirrored, or both."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from data.errors import MediaError
from data.media.opening import MediaLimits, MediaOpener
from tests.unit.test_data_video import LOSSY_TOLERANCE, encode

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def opener() -> Iterator[MediaOpener]:
    made = MediaOpener(MediaLimits())
    yield made
    made.close()


# Numbers a, b, c, d of a display matrix: a stored pixel (x, y) is shown at (ax + cy, bx + dy).
ORIENTATIONS = [
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


def four_corners(width: int = 40, height: int = 24) -> np.ndarray:
    """Return a picture with another brightness in each quarter."""
    picture = np.zeros((height, width, 3), np.uint8)
    for index, value in enumerate((10, 90, 170, 250)):
        row, column = divmod(index, 2)
        picture[row * height // 2 :, column * width // 2 :] = value
    return picture


def shown(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Move every pixel on its own, in the words of the file format."""
    a, b, c, d = matrix
    moved = {
        (a * x + c * y, b * x + d * y): picture[y, x]
        for y in range(picture.shape[0])
        for x in range(picture.shape[1])
    }
    left, top = min(x for x, _ in moved), min(y for _, y in moved)
    width, height = max(x for x, _ in moved) - left + 1, max(y for _, y in moved) - top + 1
    return np.array([[moved[x + left, y + top] for x in range(width)] for y in range(height)])


def with_matrix(content: bytes, box: bytes, matrix: tuple[float, ...]) -> bytes:
    """Return an mp4 file with another display matrix in one of its headers (of version 0)."""
    a, b, c, d = (round(number * 65536) for number in matrix)
    offset = content.index(box) + 4 + {b"tkhd": 40, b"mvhd": 36}[box]
    return (
        content[:offset]
        + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        + content[offset + 36 :]
    )


def ebml(number: int, content: bytes) -> bytes:
    return (
        number.to_bytes((number.bit_length() + 7) // 8)
        + (len(content) | 1 << 56).to_bytes(8)
        + content
    )


def with_pose(content: bytes, path: tuple[int, ...], pose: tuple[float, float, float]) -> bytes:
    """Return EBML elements in which the innermost of a path has the pose (yaw, pitch, roll) of a
    flat picture.
    """
    if not path:
        angles = (
            ebml(number, struct.pack(">f", angle))
            for number, angle in zip((0x7673, 0x7674, 0x7675), pose, strict=True)
        )
        return content + ebml(0x7670, ebml(0x7671, b"\0") + b"".join(angles))
    rebuilt, position = b"", 0
    while position < len(content):
        start = position
        position += 9 - content[position].bit_length()
        number = int.from_bytes(content[start:position])
        length = 9 - content[position].bit_length()
        size = int.from_bytes(content[position : position + length]) & ((1 << 7 * length) - 1)
        inner = content[position + length : position + length + size]
        position += length + size
        rebuilt += (
            ebml(number, with_pose(inner, path[1:], pose))
            if number == path[0]
            else content[start:position]
        )
    return rebuilt


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_video_is_turned_and_mirrored_as_its_headers_say(
    opener: MediaOpener, matrix: tuple[int, int, int, int]
) -> None:
    picture = four_corners()
    content = encode([picture] * 5)
    for box in (b"tkhd", b"mvhd"):
        frames = opener.open(with_matrix(content, box, matrix), "video")
        assert frames.pixels[0].shape == shown(picture, matrix).shape
        assert (
            np.abs(frames.pixels[0].astype(int) - shown(picture, matrix)).max() <= LOSSY_TOLERANCE
        )


def test_both_headers_of_a_video_turn_it(opener: MediaOpener) -> None:
    picture = four_corners()
    quarter, mirror = ORIENTATIONS[1], ORIENTATIONS[4]
    content = with_matrix(with_matrix(encode([picture] * 5), b"tkhd", quarter), b"mvhd", mirror)
    expected = shown(shown(picture, quarter), mirror)
    assert (
        np.abs(opener.open(content, "video").pixels[0].astype(int) - expected).max()
        <= LOSSY_TOLERANCE
    )


def test_a_scale_and_rounding_do_not_turn_and_other_angles_are_refused(opener: MediaOpener) -> None:
    content = encode([four_corners()] * 5)
    for matrix in ((2, 0, 0, 1.5), (1, 1e-4, -1e-4, 1), (0, 0, 0, 0)):
        frames = opener.open(with_matrix(content, b"tkhd", matrix), "video")
        assert np.abs(frames.pixels[0].astype(int) - four_corners()).max() <= LOSSY_TOLERANCE
    for matrix in ((0.7, 0.7, -0.7, 0.7), (1, 0, 1, 1), (1, 0, 1, 0)):
        with pytest.raises(
            MediaError, match=r"turns by no right angle, got .* expected quarter turns and mirrors"
        ) as caught:
            opener.open(with_matrix(content, b"tkhd", matrix), "video")
        assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("yaw", [0, 180])
@pytest.mark.parametrize("roll", [0, 90, 180, -90])
def test_the_pose_of_a_matroska_video(opener: MediaOpener, yaw: float, roll: float) -> None:
    picture = four_corners()
    plain = encode([picture] * 10, container="matroska")
    content = with_pose(plain, (0x18538067, 0x1654AE6B, 0xAE, 0xE0), (yaw, 0, roll))
    expected = picture[:, ::-1] if yaw else picture
    expected = np.rot90(expected, k=roll // 90)  # both count counter-clockwise
    frames = opener.open(content, "video")
    assert frames.pixels[0].shape == expected.shape
    assert np.abs(frames.pixels[0].astype(int) - expected).max() <= LOSSY_TOLERANCE
    with pytest.raises(
        MediaError, match="its pose turns by no right angle, got yaw 0, pitch 0, roll 30"
    ):
        opener.open(with_pose(plain, (0x18538067, 0x1654AE6B, 0xAE, 0xE0), (0, 0, 30)), "video")


# By the value of the EXIF field: what it says about where the first row and column of the stored
# picture lie.
EXIF_MATRICES = {
    1: (1, 0, 0, 1),  # top, left
    2: (-1, 0, 0, 1),  # top, right
    3: (-1, 0, 0, -1),  # bottom, right
    4: (1, 0, 0, -1),  # bottom, left
    5: (0, 1, 1, 0),  # left, top
    6: (0, 1, -1, 0),  # right, top
    7: (0, -1, -1, 0),  # right, bottom
    8: (0, -1, 1, 0),  # left, bottom
}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", EXIF_MATRICES)
def test_images_are_turned_and_mirrored_as_their_exif_data_say(
    opener: MediaOpener, image_format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(four_corners()).save(file, image_format, exif=exif, quality=100)
    expected = shown(four_corners(), EXIF_MATRICES[orientation])
    pixels = opener.open(file.getvalue(), "image").pixels[0]
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= LOSSY_TOLERANCE

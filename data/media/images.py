"""From an image file to RGB pixels; runs in the decoding process."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from data.errors import MediaError
from data.media.signatures import image_format

MAX_TEXT_BYTES = 1 << 28
"""Of one text or colour profile in a PNG file when it is unpacked; Pillow refuses pictures with
more than 1 MiB.
"""
ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each orientation upright; 1 is upright."""
# What Pillow raises on damaged files depends on the plug-in.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    LookupError,
    TypeError,
    OverflowError,
)
_DEPTH_SCALES = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
"""What Pillow multiplies values of other depths by, but not the value that stands for
transparent.
"""
_MARKER = re.compile(rb"\xff+([^\xff\x00\x01\xd0-\xd8])", re.DOTALL)
_END_OF_IMAGE = 0xD9


def prepare() -> list[bytes]:
    """Load what Pillow loads only when a file needs it, and let it go by our limits: the file's
    size, the process's memory and time.

    Returns:
        A small picture of every format, which can be decoded now.
    """
    Image.init()
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
    pictures = list(_examples())
    for content in pictures:
        decode_image(content, max_pixels=1 << 10)
    return pictures


def _examples() -> Iterator[bytes]:
    picture = Image.new("RGB", (2, 3))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for name in ("JPEG", "PNG", "WEBP", "BMP"):
        file = io.BytesIO()
        picture.save(file, name, exif=exif)
        yield file.getvalue()


def decode_image(content: bytes | bytearray, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Return `[1, height, width, 3]` RGB pixels of an image as it is displayed.

    Args:
        content: The whole file.
        max_pixels: Most pixels (width x height).

    Raises:
        MediaError: It is of another format, damaged, animated or too large.
    """
    name = image_format(content)
    try:
        with Image.open(io.BytesIO(content), formats=[name]) as image:
            check_pixels(*image.size, max_pixels)  # opening reads the header only
            _check_whole(name, content, image)
            _scale_transparency(image)
            return np.asarray(_to_rgb(_upright(image)))[None]
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(
            "unreadable", f"{name} is unreadable (no valid header); copy it again"
        ) from error
    except _DAMAGE as error:
        # Only some messages say that bytes are missing.
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise MediaError(
            reason, f"{name} is {reason} ({type(error).__name__}: {error}); copy it again"
        ) from error


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture or frame of too many pixels.

    Raises:
        MediaError: It has more.
    """
    if width * height > max_pixels:
        expected = f"expected at most {max_pixels}; shrink it or raise data.max_media_pixels"
        raise MediaError("oversized", f"too many pixels, got {width}x{height}, {expected}")


def _check_whole(name: str, content: bytes | bytearray, image: Image.Image) -> None:
    """Refuse what Pillow would read in part without a word: the first picture of an animation, a
    JPEG file that ends in zeros.
    """
    if name == "JPEG" and not _has_end(content):
        raise MediaError("truncated", "JPEG is truncated (no end of image); copy it again")
    if name in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        got = f"an animation of {getattr(image, 'n_frames', 'several')} pictures"
        raise MediaError(
            "unsupported_container",
            f"{name} is animated, got {got}, expected one picture; convert it to a video",
        )


def _has_end(content: bytes | bytearray) -> bool:
    """Return whether a JPEG file has its end marker, outside of its tables and previews."""
    position = 2
    while (found := _MARKER.search(content, position)) is not None:
        if found[1][0] == _END_OF_IMAGE:
            return True
        # A segment; the coded picture after it holds no markers.
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return False


def _scale_transparency(image: Image.Image) -> None:
    """Bring the transparent value of a PNG file to the depth to which its pixels are read."""
    clear: Any = image.info.get("transparency")
    tiles = getattr(image, "tile", [])
    scale = _DEPTH_SCALES.get(str(tiles[0].args)) if tiles else None
    if scale is not None and isinstance(clear, int):
        image.info["transparency"] = int(clear * scale)
    elif scale is not None and isinstance(clear, tuple):
        image.info["transparency"] = tuple(int(value * scale) for value in clear)


def _upright(image: Image.Image) -> Image.Image:
    """Return an image as its EXIF or XMP data say that it is displayed; as it is stored if these
    are damaged.
    """
    image.load()  # errors of the pixels are not errors of the data about them
    try:
        turn = _TURNS.get(image.getexif().get(ORIENTATION, 1))
    except _DAMAGE:
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image: transparent parts on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):
        return _grey(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as RGB; Pillow's own conversion clips at 255."""
    deep = np.asarray(image).astype(np.int64)
    grey = (deep >> 8).clip(0, 255).astype(np.uint8)
    clear: Any = image.info.get("transparency")
    if isinstance(clear, int):
        grey[deep == clear] = 255
    return Image.fromarray(grey).convert("RGB")

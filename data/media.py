"""Open an image or a video that a question names, within limits."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from data.containers import recognise
from data.errors import DataError, MediaError, SampleError
from data.question import MediaKind, MediaRef
from data.shards import ShardReader
from data.video import VideoDecoder

MEDIA_REASONS = ("empty", "missing", "oversized", "unsupported_container", "truncated", "unreadable", "timeout", "decoder_died")


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded pixels.

    Attributes:
        pixels: `[frames, height, width, 3]` uint8 RGB; one frame for an image.
        timestamps: Seconds of each frame from the start of the clip; `(0.0,)` for an image.
        seconds_per_frame: Seconds between two frames of a video by the rate at which it was really sampled, which the timestamps show only
            to the nearest frame of the clip; `None` if only they are known.
    """

    pixels: npt.NDArray[np.uint8]
    timestamps: tuple[float, ...]
    seconds_per_frame: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits:
    """What is opened, and how much of it.

    Attributes:
        max_bytes: Largest file.
        max_pixels: Most pixels (width x height) of an image or a video frame.
        frames_per_second: Rate at which frames of a video are sampled.
        max_frames: Most frames of one video; a longer clip is sampled more sparsely.
        decode_timeout_seconds: Time for one video, after which its worker is killed.
        num_workers: Video decoding processes.
        worker_memory_bytes: Address space of each; the sampled frames of a clip may take a quarter of it.
    """

    max_bytes: int = 256_000_000
    max_pixels: int = 40_000_000
    frames_per_second: float = 2.0
    max_frames: int = 64
    decode_timeout_seconds: float = 30.0
    num_workers: int = 1
    worker_memory_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        """Refuse limits that would let nothing through.

        Raises:
            DataError: A limit is not positive.
        """
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise DataError(f"MediaLimits: {name} is not positive, got {getattr(self, name)}; correct it")


class MediaOpener:
    """Turns files into frames; images here, videos in worker processes. Safe to use from several threads."""

    def __init__(self, limits: MediaLimits) -> None:
        self.limits = limits
        self._decoder = VideoDecoder(limits.num_workers, limits.worker_memory_bytes, limits.decode_timeout_seconds)

    def open(self, content: bytes, kind: MediaKind) -> Frames:
        """Return the frames of one file.

        Args:
            content: The whole file.
            kind: What the question says it is.

        Raises:
            MediaError: The file cannot be opened within the limits; `reason` is one of `MEDIA_REASONS`.
            DataError: The video decoder is not installed.
        """
        if not content:
            raise MediaError("empty", f"{kind}: the file is empty; copy it anew")
        self._check_bytes(kind, len(content))
        return self._open_image(content) if kind == "image" else self._open_video(content)

    def open_ref(self, ref: MediaRef, reader: ShardReader) -> Frames:
        """Return the frames of a file named by reference; a file too large is refused before it is read.

        Raises:
            MediaError: As `open`, besides `missing`; the message names the file.
            DataError: The shard is missing or was changed, or the video decoder is not installed.
        """
        content = self.read_ref(ref, reader)
        try:
            return self.open(content, ref.kind)
        except MediaError as error:
            raise MediaError(error.reason, f"{ref.shard}:{ref.key}.{ref.extension}: {error}") from error

    def read_ref(self, ref: MediaRef, reader: ShardReader) -> bytes:
        """Return a file named by reference as it is; a file too large is refused before it is read.

        Raises:
            MediaError: The file is missing or too large; the message names it.
            DataError: The shard is missing or was changed.
        """
        try:
            self._check_bytes(ref.kind, reader.media_size(ref))
            return reader.media_bytes(ref)
        except SampleError as error:
            raise MediaError("missing", str(error)) from error
        except MediaError as error:
            raise MediaError(error.reason, f"{ref.shard}:{ref.key}.{ref.extension}: {error}") from error

    def close(self) -> None:
        """End the worker processes; a later `open` starts new ones."""
        self._decoder.close()

    def _check_bytes(self, kind: MediaKind, size: int) -> None:
        if size > self.limits.max_bytes:
            expected = f"expected at most {self.limits.max_bytes}; shrink it or raise data.max_media_bytes"
            raise MediaError("oversized", f"{kind}: too large, got {size} bytes, {expected}")

    def _check_pixels(self, kind: MediaKind, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            expected = f"expected at most {self.limits.max_pixels}; shrink it or raise data.max_media_pixels"
            raise MediaError("oversized", f"{kind}: too many pixels, got {width}x{height}, {expected}")

    def _open_image(self, content: bytes) -> Frames:
        image_format = recognise_image(content)
        try:
            with Image.open(io.BytesIO(content), formats=[image_format]) as image:
                self._check_pixels("image", *image.size)  # opening reads the header only
                pixels = np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
        except MediaError:
            raise
        except Image.DecompressionBombError as error:
            raise MediaError("oversized", f"image: {error}; shrink it") from error
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, TypeError, IndexError, OverflowError) as error:
            # What Pillow raises on damaged files depends on the plug-in; only some messages say that bytes are missing.
            reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
            raise MediaError(reason, f"image: {image_format} is {reason} ({type(error).__name__}: {error}); copy it anew") from error
        return Frames(pixels=pixels[None], timestamps=(0.0,))

    def _open_video(self, content: bytes) -> Frames:
        container = recognise(content)
        self._check_pixels("video", container.width, container.height)
        request = {
            "frames_per_second": self.limits.frames_per_second,
            "max_frames": self.limits.max_frames,
            "num_pixels": container.width * container.height,
            "max_pixels": self.limits.max_pixels,
            "max_clip_bytes": self.limits.worker_memory_bytes // 4,  # the decoder holds them twice, besides its own frames
        }
        pixels, timestamps, seconds_per_frame = self._decoder.decode(request, content)
        return Frames(pixels=pixels, timestamps=timestamps, seconds_per_frame=seconds_per_frame)


def recognise_image(content: bytes) -> str:
    """Return Pillow's name of an image format by its first bytes.

    Raises:
        MediaError: It is none of those that are opened.
    """
    if content[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[:2] == b"BM":
        return "BMP"
    expected = "expected JPEG, PNG, WebP or BMP; convert it"
    raise MediaError("unsupported_container", f"image: format not recognised, got first bytes {content[:12]!r}, {expected}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image: transparent parts on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8  # Pillow's own conversion clips at 255
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")

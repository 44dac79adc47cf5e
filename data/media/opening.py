"""Open an image or a video that a question names, within limits."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from data.errors import DataError, MediaError, SampleError
from data.media.decoder import FrameLimits, MediaDecoder, WorkerLimits
from data.media.sampling import FrameSampling
from data.question import MediaKind, MediaRef
from data.source import ReadsMedia

MAX_LIMIT = 1 << 50


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded pixels.

    Attributes:
        pixels: `[frames, height, width, 3]` uint8 RGB; one frame for an image.
        timestamps: Seconds of each frame from the start of the clip; `(0.0,)` for an image.
        seconds_per_frame: Seconds between two frames of a video by the rate at which it was really
            sampled, which the timestamps show only to the nearest frame of the clip; `None` if only
            they are known.
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
        sampling: Which frames of a video are taken.
        decode_timeout_seconds: Time for one file, after which its worker is killed.
        num_workers: Decoding processes.
        worker_memory_bytes: Address space of each; the sampled frames of a clip may take a quarter
            of it.
    """

    max_bytes: int = 256_000_000
    max_pixels: int = 40_000_000
    sampling: FrameSampling = field(default_factory=FrameSampling)
    decode_timeout_seconds: float = 30.0
    num_workers: int = 1
    worker_memory_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        """Refuse limits that would let nothing through.

        Raises:
            DataError: A limit is not positive, or larger than any file, clip or wait can be.
        """
        for name in self.__slots__:
            if name != "sampling" and not 0 < getattr(self, name) <= MAX_LIMIT:
                expected = f"expected more than 0 and at most {MAX_LIMIT}"
                raise DataError(
                    f"MediaLimits: {name} is wrong, got {getattr(self, name)}, {expected}; correct "
                    "it"
                )


class MediaOpener:
    """Turns files into frames, in worker processes. Safe to use from several threads.

    Attributes:
        frame_limits: What of a file is decoded.
    """

    def __init__(self, limits: MediaLimits) -> None:
        self.limits = limits
        self.frame_limits = FrameLimits(
            max_pixels=limits.max_pixels,
            sampling=limits.sampling,
            max_clip_bytes=limits.worker_memory_bytes
            // 4,  # the decoder holds them twice, besides its own frames
        )
        worker_limits = WorkerLimits(
            memory_bytes=limits.worker_memory_bytes, timeout_seconds=limits.decode_timeout_seconds
        )
        self._decoder = MediaDecoder(limits.num_workers, worker_limits)

    def open(self, content: bytes, kind: MediaKind) -> Frames:
        """Return the frames of one file.

        Args:
            content: The whole file.
            kind: What the question says it is.

        Raises:
            MediaError: The file cannot be opened within the limits; `reason` is one of
                `data.errors.MEDIA_REASONS`.
            DataError: The video decoder is not installed.
        """
        if not content:
            raise MediaError("empty", f"{kind}: the file is empty; copy it again")
        self._check_bytes(kind, len(content))
        decoded = self._decoder.decode(kind, content, self.frame_limits)
        return Frames(decoded.pixels, decoded.timestamps, decoded.seconds_per_frame)

    def open_ref(self, ref: MediaRef, reader: ReadsMedia) -> Frames:
        """Return the frames of a file named by reference; a file too large is refused before it is
        read.

        Raises:
            MediaError: As `open`, besides `missing`; the message names the file.
            DataError: What holds it is missing or was changed, or the video decoder is not
                installed.
        """
        return self.decode_ref(ref, self.read_ref(ref, reader))

    def decode_ref(self, ref: MediaRef, content: bytes) -> Frames:
        """Return the frames of a file that was read by reference.

        Raises:
            MediaError: As `open`; the message names the file.
            DataError: The video decoder is not installed.
        """
        try:
            return self.open(content, ref.kind)
        except MediaError as error:
            raise MediaError(
                error.reason, f"{ref.shard}:{ref.key}.{ref.extension}: {error}"
            ) from error

    def read_ref(self, ref: MediaRef, reader: ReadsMedia) -> bytes:
        """Return a file named by reference as it is; a file too large is refused before it is read.

        Raises:
            MediaError: The file is missing or too large; the message names it.
            DataError: What holds it is missing or was changed.
        """
        try:
            self._check_bytes(ref.kind, reader.media_size(ref))
            return reader.media_bytes(ref)
        except SampleError as error:
            raise MediaError("missing", str(error)) from error
        except MediaError as error:
            raise MediaError(
                error.reason, f"{ref.shard}:{ref.key}.{ref.extension}: {error}"
            ) from error

    def close(self) -> None:
        """End the worker processes; a later `open` starts new ones."""
        self._decoder.close()

    def _check_bytes(self, kind: MediaKind, size: int) -> None:
        if size > self.limits.max_bytes:
            expected = (
                f"expected at most {self.limits.max_bytes}; shrink it or raise data.max_media_bytes"
            )
            raise MediaError("oversized", f"{kind}: too large, got {size} bytes, {expected}")

"""Images and videos decoded in processes that may hang or die without harm to the run; nothing here
reads a file.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from data.errors import MEDIA_REASONS, DataError, MediaError
from data.media.sampling import FrameSampling
from data.question import MediaKind
from data.text import clean_text
from data.worker import Header, KillableWorker, WorkerDied, WorkerNotStarted, WorkerPool

WORKER_MODULE = "data.media.worker_main"
MAX_DETAIL = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What one process may take.

    Attributes:
        memory_bytes: Address space.
        timeout_seconds: Wall-clock time of one file, after which its process is killed. The kernel
            ends it at about twice this much CPU time.
    """

    memory_bytes: int
    timeout_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLimits:
    """What of a file is decoded.

    Attributes:
        max_pixels: Most pixels (width x height) of an image or a frame.
        sampling: Which frames of a video are taken.
        max_clip_bytes: Most bytes of all of them.
    """

    max_pixels: int
    sampling: FrameSampling
    max_clip_bytes: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels `[frames, height, width, 3]`, the seconds of each frame, and those between two by the
    sampling rate (videos only).
    """

    pixels: npt.NDArray[np.uint8]
    timestamps: tuple[float, ...]
    seconds_per_frame: float | None


class MediaDecoder:
    """A fixed number of decoding processes, each started when first needed; safe to use from
    several threads.
    """

    def __init__(self, num_workers: int, limits: WorkerLimits) -> None:
        """Start nothing yet.

        Args:
            num_workers: Most processes, and most files decoded at once.
            limits: Of each process.
        """
        self._timeout_seconds = limits.timeout_seconds
        arguments = str(limits.memory_bytes), str(limits.timeout_seconds)
        self._pool = WorkerPool(
            partial(KillableWorker, WORKER_MODULE, *arguments), num_workers, limits.timeout_seconds
        )

    def decode(self, kind: MediaKind, content: bytes, limits: FrameLimits) -> Decoded:
        """Return what is in one file.

        Raises:
            MediaError: It cannot be decoded within the limits; the next file gets a working process
                again.
            DataError: No process can be started, or the video decoder cannot be imported.
        """
        answer = _Answer(kind, limits)
        try:
            self._pool.request({"kind": kind, "limits": asdict(limits)}, content, answer.receive)
        except TimeoutError as error:
            message = (
                f"{kind}: not decoded within {self._timeout_seconds:g} s; shrink it or raise "
                "data.decode_timeout_seconds"
            )
            raise MediaError("timeout", message) from error
        except WorkerDied as error:
            raise MediaError(
                "decoder_died",
                f"{kind}: the decoder died on it ({error}); convert or remove the file",
            ) from error
        except WorkerNotStarted as error:
            raise DataError(
                f"{kind}: the decoding process does not start ({error}); install pillow and numpy "
                "again"
            ) from error
        return answer.decoded()

    def close(self) -> None:
        """End all processes; the next file starts new ones."""
        self._pool.close()


class _Answer:
    """The reply of a process, checked like any input, because a forged file may have taken the
    process over.
    """

    def __init__(self, kind: MediaKind, limits: FrameLimits) -> None:
        self._kind = kind
        self._limits = limits
        self._error: DataError | None = None
        self._decoded: Decoded | None = None

    def receive(self, header: Header) -> memoryview:
        """Return where the pixels go.

        Raises:
            ValueError, TypeError, KeyError: The header makes no sense.
        """
        if "shape" not in header:
            self._error = self._refusal(header)
            return memoryview(b"")
        frames, height, width, channels = map(int, header["shape"])
        most_frames = 1 if self._kind == "image" else self._limits.sampling.max_frames
        if not (
            0 < frames <= most_frames
            and min(height, width) > 0
            and height * width <= self._limits.max_pixels
            and channels == 3
        ):
            raise ValueError(f"shape {header['shape']}")
        pixels = np.empty((frames, height, width, 3), np.uint8)
        self._decoded = Decoded(pixels, *self._times(header, frames))
        return pixels.data.cast("B")

    def decoded(self) -> Decoded:
        """Return what was received, or raise the error that came instead."""
        if self._error is not None:
            raise self._error
        assert self._decoded is not None
        return self._decoded

    def _times(self, header: Header, frames: int) -> tuple[tuple[float, ...], float | None]:
        if self._kind == "image":
            return (0.0,), None
        timestamps, seconds = (
            tuple(map(float, header["timestamps"])),
            float(header["seconds_per_frame"]),
        )
        if len(timestamps) != frames or not all(map(math.isfinite, timestamps)):
            raise ValueError(f"{len(timestamps)} time stamps for {frames} frames")
        if not 0 < seconds < math.inf:
            raise ValueError(f"{seconds} seconds per frame")
        return timestamps, seconds

    def _refusal(self, header: Header) -> DataError:
        reason, detail = header["reason"], clean_text(str(header["detail"]))[:MAX_DETAIL]
        if reason == "no_decoder":
            return DataError(f"{self._kind}: {detail}")
        return MediaError(
            reason if reason in MEDIA_REASONS else "unreadable", f"{self._kind}: {detail}"
        )

"""From a video file to sampled RGB frames; runs in the decoding process."""

from __future__ import annotations

import io
from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import MediaError
from data.media.containers import recognise
from data.media.images import check_pixels

MAX_SECONDS = 1e9
MAX_FAULTY_FRACTION = 0.02  # frames that the decoder may replace by their neighbours


def choose_frames(
    starts: list[float], ends: list[float], frames_per_second: float, max_frames: int
) -> list[int]:
    """Return the frames shown at the middles of equal parts of the clip: as many parts as the rate
    asks for, at most `max_frames`.

    Args:
        starts: `[frames]` seconds at which each frame appears, ascending.
        ends: `[frames]` seconds at which it ends.
        frames_per_second: Rate of sampling.
        max_frames: Most frames.
    """
    duration = ends[-1] - starts[0]
    num_parts = min(max_frames, len(starts), max(1, round(duration * frames_per_second)))
    middles = [starts[0] + (part + 0.5) * (duration / num_parts) for part in range(num_parts)]
    # A frame that stays longer than a part is taken once.
    return sorted(
        {min(max(bisect_right(starts, middle) - 1, 0), len(starts) - 1) for middle in middles}
    )


def seconds_per_frame(duration: float, num_frames: int, frames_per_second: float) -> float:
    """Return the time from one sampled frame to the next: that of the rate asked for, or more where
    there were too few frames for it.

    A clip is rarely a whole number of parts long; what rounding their number takes from a part is
    not counted.

    Args:
        duration: Seconds of the whole clip.
        num_frames: Frames sampled from it.
        frames_per_second: Rate asked for.
    """
    return max(1 / frames_per_second, duration / num_frames)


def read_frames(reader: Any, frames: list[int]) -> Any:
    """Return `[frames, height, width, 3]` pixels."""
    import decord

    try:
        return np.ascontiguousarray(reader.get_batch(frames).asnumpy())
    except decord.DECORDError:
        # The decoder pads rows of some narrow widths (16, 32, 96, …), takes the padding for more
        # channels, [height, width, more], and then cannot copy them into a batch. One at a time
        # they come as they are, and can be cut.
        padded = [reader[frame].asnumpy() for frame in frames]
        rows = [frame.reshape(frame.shape[0], -1)[:, : frame.shape[1] * 3] for frame in padded]
        return np.stack(
            [
                row.reshape(frame.shape[0], frame.shape[1], 3)
                for row, frame in zip(rows, padded, strict=True)
            ]
        )


def decode_video(
    content: bytearray,
    *,
    max_pixels: int,
    frames_per_second: float,
    max_frames: int,
    max_clip_bytes: int,
) -> tuple[npt.NDArray[np.uint8], list[float], float]:
    """Return `[frames, height, width, 3]` pixels, the seconds of each frame, and the seconds
    between two by the sampling rate.

    Args:
        content: The whole file; its display matrix is reset.
        max_pixels: Most pixels (width x height) of a frame.
        frames_per_second: Rate of sampling.
        max_frames: Most frames.
        max_clip_bytes: Most bytes of all frames together.

    Raises:
        MediaError: It is of another format, damaged or too large.
    """
    import decord

    container = recognise(content)
    check_pixels(container.width, container.height, max_pixels)
    container.display.clear(content)
    reader = decord.VideoReader(
        io.BytesIO(content), ctx=decord.cpu(0), num_threads=1, fault_tol=MAX_FAULTY_FRACTION
    )
    try:
        if len(reader) == 0:
            raise MediaError("unreadable", "it has no frames; convert or remove the file")
        spans = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))), dtype=np.float64)
        starts, ends = spans[:, 0].tolist(), spans[:, 1].tolist()
        if not (
            np.abs(spans) < MAX_SECONDS
        ).all():  # what decord says of H.264 clips of up to 7 frames in Matroska files
            raise MediaError(
                "unreadable", "the decoder does not find the times of its frames; convert it to mp4"
            )
        if starts != sorted(starts) or ends[-1] < starts[0]:
            raise MediaError(
                "unreadable", "its time stamps are not ascending; convert or remove the file"
            )
        frames = choose_frames(starts, ends, frames_per_second, max_frames)
        needed = len(frames) * container.width * container.height * 3
        if needed > max_clip_bytes:
            raise MediaError(
                "oversized",
                f"{len(frames)} frames take {needed} bytes, expected at most {max_clip_bytes}; "
                "shrink it",
            )
        pixels = container.display.apply(read_frames(reader, frames))
    finally:
        # An idle reader decodes the rest of the clip into memory.
        del reader
    if pixels.shape[1] * pixels.shape[2] > max_pixels:
        got = f"frames are {pixels.shape[2]}x{pixels.shape[1]}, more than the headers state"
        raise MediaError("oversized", f"{got}; convert or remove the file")
    # The decoder keeps times in single precision; what is below a millisecond is noise.
    timestamps = [round(starts[frame] - starts[0], 3) for frame in frames]
    return (
        pixels,
        timestamps,
        seconds_per_frame(round(ends[-1] - starts[0], 3), len(frames), frames_per_second),
    )

"""From a video file to sampled RGB frames; runs in the decoding process."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import MediaError
from data.media.containers import recognise
from data.media.images import check_pixels
from data.media.sampling import FrameSampling, usable_rate

MAX_FAULTY_FRACTION = 0.02  # frames that the decoder may replace by their neighbours


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
    sampling: FrameSampling,
    max_clip_bytes: int,
) -> tuple[npt.NDArray[np.uint8], list[float], float]:
    """Return `[frames, height, width, 3]` pixels, the seconds of each frame, and the seconds
    between two by the sampling rate.

    Args:
        content: The whole file; its display matrix is reset.
        max_pixels: Most pixels (width x height) of a frame.
        sampling: Which frames are taken.
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
        num_frames = len(reader)
        if num_frames == 0:
            raise MediaError("unreadable", "it has no frames; convert or remove the file")
        rate = usable_rate(reader.get_avg_fps())
        frames = sampling.choose(num_frames, rate)
        needed = len(frames) * container.width * container.height * 3
        if needed > max_clip_bytes:
            raise MediaError(
                "oversized",
                f"{len(frames)} frames take {needed} bytes, expected at most {max_clip_bytes}; "
                "shrink it or lower data.video_max_frames",
            )
        pixels = container.display.apply(read_frames(reader, frames))
    finally:
        # An idle reader decodes the rest of the clip into memory.
        del reader
    if pixels.shape[1] * pixels.shape[2] > max_pixels:
        got = f"frames are {pixels.shape[2]}x{pixels.shape[1]}, more than the headers state"
        raise MediaError("oversized", f"{got}; convert or remove the file")
    # As in transformers a frame's time is its number by the clip's rate, not its time stamp.
    timestamps = [frame / rate for frame in frames]
    return pixels, timestamps, 1 / (len(frames) / num_frames * rate)

"""Images and video frames to patches and their (t, h, w) grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from encoders.config import ProcessorConfig

MAX_ASPECT_RATIO = 200
"""Largest ratio of the sides that the model family accepts."""


@dataclass(frozen=True, slots=True)
class VisionInput:
    """One processed image or video.

    Attributes:
        kind: `image` or `video`.
        patches: `[t * h * w, channels * temporal_patch_size * patch_size * patch_size]` float32.
        grid: `(t, h, w)` in patches.
        timestamps: Seconds, one per temporal patch of a video; empty for an image.
        seconds_per_patch: Seconds from one temporal patch of a video to the next; 0 for an image.
    """

    kind: Literal["image", "video"]
    patches: npt.NDArray[np.float32]
    grid: tuple[int, int, int]
    timestamps: tuple[float, ...] = ()
    seconds_per_patch: float = 0.0


def process_image(pixels: npt.NDArray[np.uint8], config: ProcessorConfig) -> VisionInput:
    """Resize, normalise and patchify an image, equal bit for bit to transformers' PIL processor.

    Args:
        pixels: `[height, width, 3]` RGB.
        config: The tower's processor settings.

    Raises:
        ValueError: The array is not an RGB image or its sides differ too much.
    """
    _check_pixels(pixels, 3, "process_image", "[height, width, 3]")
    height, width, _ = pixels.shape
    size = image_size(height, width, config)
    resized = _resize(pixels, size)[None]
    frames = np.repeat(resized, config.temporal_patch_size, axis=0)
    patches, grid = patchify(frames, config)
    return VisionInput(kind="image", patches=patches, grid=grid)


def process_video(
    frames: npt.NDArray[np.uint8],
    timestamps: Sequence[float],
    config: ProcessorConfig,
    seconds_per_frame: float | None = None,
) -> VisionInput:
    """Resize, normalise and patchify sampled frames; see `resize_video` and `patchify_video`."""
    return patchify_video(resize_video(frames, config), timestamps, config, seconds_per_frame)


def resize_video(frames: npt.NDArray[np.uint8], config: ProcessorConfig) -> npt.NDArray[np.uint8]:
    """Resize sampled frames to what the model sees.

    Args:
        frames: `[frames, height, width, 3]` RGB.
        config: The tower's processor settings.

    Raises:
        ValueError: The array is not RGB frames, or the sides differ too much.
    """
    _check_pixels(frames, 4, "process_video", "[frames, height, width, 3]")
    num_frames, height, width, _ = frames.shape
    size = video_size(num_frames, height, width, config)
    return np.stack([_resize(frame, size) for frame in frames])


def patchify_video(
    resized: npt.NDArray[np.uint8],
    timestamps: Sequence[float],
    config: ProcessorConfig,
    seconds_per_frame: float | None = None,
) -> VisionInput:
    """Normalise and patchify resized frames; the last frame is repeated until the temporal patches
    are full.

    Args:
        resized: `[frames, height, width, 3]` RGB.
        timestamps: Seconds of each frame.
        config: The tower's processor settings.
        seconds_per_frame: Seconds between two frames by the sampling rate; `None` takes the mean of
            what the timestamps say.

    Returns:
        The patches; a temporal patch's timestamp is the mean of its first and last frame's.

    Raises:
        ValueError: The timestamps do not fit.
    """
    if len(timestamps) != len(resized):
        raise ValueError(
            f"process_video: timestamps do not fit, got {len(timestamps)}, expected "
            f"{len(resized)}, one per frame; check the frame sampling"
        )
    missing = -len(resized) % config.temporal_patch_size
    filled = np.concatenate([resized, np.repeat(resized[-1:], missing, axis=0)])
    times = np.asarray([*timestamps, *[timestamps[-1]] * missing], dtype=np.float64).reshape(
        -1, config.temporal_patch_size
    )
    patches, grid = patchify(filled, config)
    if seconds_per_frame is None:
        seconds_per_frame = (timestamps[-1] - timestamps[0]) / max(1, len(timestamps) - 1)
    return VisionInput(
        kind="video",
        patches=patches,
        grid=grid,
        timestamps=tuple(((times[:, 0] + times[:, -1]) / 2).tolist()),
        seconds_per_patch=seconds_per_frame * config.temporal_patch_size,
    )


def image_size(height: int, width: int, config: ProcessorConfig) -> tuple[int, int]:
    """Return height and width after resizing: multiples of the merged patch, pixels within the
    image limits.

    Raises:
        ValueError: One side is more than 200 times the other.
    """
    _check_aspect(height, width)
    return _fit(
        height,
        width,
        1,
        1,
        config.merged_patch_pixels,
        (config.image_min_pixels, config.image_max_pixels),
    )


def video_size(
    num_frames: int, height: int, width: int, config: ProcessorConfig
) -> tuple[int, int]:
    """Return the frames' height and width after resizing: the limits hold for frames x height x
    width, or for every frame.

    Where they hold for all frames together, a clip shorter than one temporal patch counts as a full
    one, because its last frame is repeated.

    Raises:
        ValueError: One side is more than 200 times the other.
    """
    unit = config.merged_patch_pixels
    if config.video_limits_per_frame:
        _check_aspect(height, width)
        return _fit(
            height,
            width,
            1,
            1,
            unit,
            (config.video_min_pixels, _most_pixels_of_a_frame(num_frames, config)),
        )
    if min(height, width) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    num_frames = max(num_frames, config.temporal_patch_size)
    # round() is half to even here as in the reference: five frames in pairs count as four when the
    # limits are checked.
    counted = round(num_frames / config.temporal_patch_size) * config.temporal_patch_size
    most = config.video_max_pixels
    if config.video_frame_pixels is not None:
        most = num_frames * _capped(
            min(config.video_frame_pixels, config.video_max_pixels // num_frames), config
        )
    return _fit(height, width, num_frames, counted, unit, (config.video_min_pixels, most))


def _most_pixels_of_a_frame(num_frames: int, config: ProcessorConfig) -> int:
    """Return the limit of a frame, which is lower in a video of many frames if they share a number
    of pixels.
    """
    if config.video_shared_pixels is None:
        return config.video_max_pixels
    return _capped(min(config.video_max_pixels, config.video_shared_pixels // num_frames), config)


def _capped(pixels: int, config: ProcessorConfig) -> int:
    """Return the limit of a frame that has its part of a number of pixels: however many frames
    there are, each keeps a little more than the least size, as in the reference.
    """
    return max(pixels, int(config.video_min_pixels * 1.05))


def patchify(
    frames: npt.NDArray[np.uint8], config: ProcessorConfig
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Normalise resized frames and cut them into patches.

    Args:
        frames: `[frames, height, width, 3]`, all three multiples of the patch sizes.
        config: The tower's processor settings.

    Returns:
        `[t * h * w, 3 * temporal * patch * patch]`, patches of one merged square side by side, and
        the grid `(t, h, w)`.
    """
    temporal, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    num_frames, height, width, channels = frames.shape
    t, h, w = num_frames // temporal, height // patch, width // patch
    blocks = frames.reshape(
        t, temporal, h // merge, merge, patch, w // merge, merge, patch, channels
    )
    ordered = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels, -1)
    table = _normalised_values(config)
    patches = np.empty(ordered.shape, dtype=np.float32)
    for channel in range(channels):
        patches[:, channel] = table[channel][ordered[:, channel]]
    return patches.reshape(t * h * w, -1), (t, h, w)


def _normalised_values(config: ProcessorConfig) -> npt.NDArray[np.float32]:
    """Return `[3, 256]`: what each byte of each channel becomes.

    Resized pixels are bytes, so the table is exact; the rounding (product in float64, difference
    and quotient in float32) is that of transformers.
    """
    rescaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean = np.array(config.image_mean, dtype=np.float32)[:, None]
    std = np.array(config.image_std, dtype=np.float32)[:, None]
    values: npt.NDArray[np.float32] = (rescaled[None] - mean) / std
    return values


def _fit(
    height: int, width: int, frames: int, counted_frames: int, unit: int, limits: tuple[int, int]
) -> tuple[int, int]:
    """Round both sides to multiples of `unit`, then shrink or grow them so that all frames' pixels
    are within the limits.
    """
    rounded = round(height / unit) * unit, round(width / unit) * unit
    volume = counted_frames * rounded[0] * rounded[1]
    low, high = limits
    if volume > high:
        shrink = math.sqrt(frames * height * width / high)
        return max(unit, math.floor(height / shrink / unit) * unit), max(
            unit, math.floor(width / shrink / unit) * unit
        )
    if volume < low:
        grow = math.sqrt(low / (frames * height * width))
        return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return max(unit, rounded[0]), max(unit, rounded[1])


def _resize(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    if pixels.shape[:2] == size:
        return pixels
    resized: npt.NDArray[np.uint8] = np.asarray(
        Image.fromarray(pixels).resize((size[1], size[0]), resample=Image.Resampling.BICUBIC)
    )
    return resized


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"vision processor: sides differ too much, got {height}x{width}, expected a ratio of "
            f"at most {MAX_ASPECT_RATIO}; crop or drop the media"
        )


def _check_pixels(pixels: npt.NDArray[np.uint8], dimensions: int, where: str, shape: str) -> None:
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != dimensions
        or pixels.shape[-1] != 3
        or 0 in pixels.shape
    ):
        raise ValueError(
            f"{where}: wrong pixels, got {pixels.dtype} {pixels.shape}, expected non-empty uint8 "
            f"{shape}; convert to RGB bytes first"
        )

"""The media of a prompt as vLLM's `features`: where their placeholders are, and their patches."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from encoders.config import ProcessorConfig, VideoLayout
from encoders.processor import VisionInput
from zppo_mm.experience import IntArray
from zppo_mm.rollout.served.packing import Field, pack_item

HASH_BYTES = 16
MAX_ROUNDING = 0.01
"""Of a pixel that was normalised and back, in float32."""


@dataclass(frozen=True, slots=True)
class MediaReading:
    """How the model reads media.

    Attributes:
        placeholder_ids: Tokens that stand for features.
        processor: How pixels became patches; `None` for a model that takes no media.
        video_layout: How a video stands in the prompt.
    """

    placeholder_ids: tuple[int, ...]
    processor: ProcessorConfig | None
    video_layout: VideoLayout


@dataclass(frozen=True, slots=True)
class MediaItem:
    """An image, a video or a temporal patch of one, and the run of placeholders that it fills.

    Attributes:
        modality: `image` or `video`, as the server is asked for it.
        pixels: `[patches, channels * temporal_patch_size * patch_size * patch_size]`, 0 to 255.
        grid: `(t, h, w)` in patches.
        seconds_per_patch: From one temporal patch of a video to the next.
        offset: Of the run in the prompt.
        length: Of the run.
    """

    modality: str
    pixels: npt.NDArray[np.uint8]
    grid: tuple[int, int, int]
    seconds_per_patch: float
    offset: int
    length: int


def place_media(
    token_ids: IntArray, vision: Sequence[VisionInput], reading: MediaReading
) -> tuple[MediaItem, ...]:
    """Return the media of a prompt with their placeholders.

    A run of placeholders is sent without a mask, so a video whose temporal patches have their times
    between them is sent as one image for each: the vision tower and the rotary positions treat them
    alike.

    Args:
        token_ids: `[prompt]`.
        vision: In prompt order.
        reading: Of the model.
    """
    if reading.processor is None:
        assert not vision, "a model that takes no media"
        return ()
    at = np.flatnonzero(np.isin(token_ids, reading.placeholder_ids))
    items: list[MediaItem] = []
    first = 0
    for each in _pieces(vision, reading.video_layout):
        length = prod(each.grid) // reading.processor.merge_size**2
        run = at[first : first + length]
        assert len(run) == length, "every feature has its placeholder"
        assert run[-1] - run[0] == length - 1, "one run per medium"
        pixels = pixels_of(each.patches, reading.processor)
        span = (int(run[0]), length)
        items.append(MediaItem(each.kind, pixels, each.grid, each.seconds_per_patch, *span))
        first += length
    assert first == len(at), "every placeholder has its feature"
    assert all(one.offset + one.length <= two.offset for one, two in pairwise(items))
    return tuple(items)


def _pieces(vision: Sequence[VisionInput], layout: VideoLayout) -> list[VisionInput]:
    pieces = []
    for each in vision:
        frames, height, width = each.grid
        if each.kind == "image" or not layout.timestamped:
            pieces.append(each)
            continue
        pieces += [
            VisionInput("image", patches, (1, height, width))
            for patches in np.split(each.patches, frames)
        ]
    return pieces


def pixels_of(
    patches: npt.NDArray[np.float32], processor: ProcessorConfig
) -> npt.NDArray[np.uint8]:
    """Return the pixels that patches were made of, exactly: vLLM takes these, a quarter of the
    bytes, and normalises them in its tower.

    Args:
        patches: `[patches, channels * elements]`, normalised.
        processor: How they were.
    """
    mean = np.array(processor.image_mean, dtype=np.float32)[:, None]
    std = np.array(processor.image_std, dtype=np.float32)[:, None]
    by_channel = patches.reshape(len(patches), len(mean), -1)
    values = (by_channel * std + mean) / np.float32(processor.rescale_factor)
    pixels = np.rint(values)
    assert np.abs(values - pixels).max(initial=0.0) < MAX_ROUNDING, "patches of whole pixels"
    bytes_of: npt.NDArray[np.uint8] = pixels.astype(np.uint8).reshape(patches.shape)
    return bytes_of


def features(items: Collection[MediaItem]) -> Mapping[str, Any]:
    """Return the JSON object with which a server gets media."""
    modalities = sorted({item.modality for item in items})
    by_modality = {
        modality: [item for item in items if item.modality == modality] for modality in modalities
    }
    packed = {name: [_packed(item) for item in each] for name, each in by_modality.items()}
    return {
        "mm_hashes": {name: [_name(each) for each in those] for name, those in packed.items()},
        "mm_placeholders": {
            name: [{"offset": item.offset, "length": item.length} for item in each]
            for name, each in by_modality.items()
        },
        "kwargs_data": {
            name: [base64.b64encode(each).decode() for each in those]
            for name, those in packed.items()
        },
    }


def _name(content: bytes) -> str:
    """Return the name by which a server keeps what it computed of a medium."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).hexdigest()


def _packed(item: MediaItem) -> bytes:
    grid = Field(np.asarray(item.grid, dtype=np.int64), is_per_item=True)
    if item.modality == "image":
        return pack_item({"pixel_values": Field(item.pixels), "image_grid_thw": grid})
    seconds = np.asarray(item.seconds_per_patch, dtype=np.float32)
    return pack_item(
        {
            "pixel_values_videos": Field(item.pixels),
            "video_grid_thw": grid,
            "second_per_grid_ts": Field(seconds, is_per_item=True),
        }
    )

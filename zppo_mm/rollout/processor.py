"""How a model's images and videos are processed: by its folder's files, where no key of `data` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.media.sampling import FrameSampling
from encoders.config import NO_OVERRIDES, ProcessorConfig, VideoLayout, read_processor_config
from encoders.processor_export import changed_files
from zppo_mm.config.schema import DataConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.families.table import FAMILIES
from zppo_mm.rollout.chat_template import read_json

OVERRIDES = (
    "image_min_pixels",
    "image_max_pixels",
    "video_max_pixels",
    "video_frames_per_second",
    "video_min_frames",
    "video_max_frames",
)
"""Keys of `data` that take precedence over the folder's files, where they are not 0."""


def processor_overrides(data: DataConfig) -> dict[str, int | float]:
    """Return what a run has other than its models' folders."""
    return {name: getattr(data, name) for name in OVERRIDES if getattr(data, name)}


def read_processor(
    folder: str | Path, overrides: Mapping[str, int | float] = NO_OVERRIDES
) -> ProcessorConfig | None:
    """Return a folder's processor settings; `None` for a model that takes no media.

    Raises:
        ConfigError: The folder lacks a part or contradicts itself or the overrides.
    """
    config = read_json(Path(folder) / "config.json")
    if "vision_config" not in config:
        return None
    try:
        return read_processor_config(folder, find_video_layout(folder, config), overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def changed_processor_files(
    folder: str | Path, overrides: Mapping[str, int | float]
) -> dict[str, bytes]:
    """Return the processor files with which a model sees what it was trained on, by name; those
    that the folder has already are left out.

    Raises:
        ConfigError: As `read_processor`.
    """
    own = read_processor(folder) if overrides else None
    trained = read_processor(folder, overrides) if overrides else None
    if own is None or trained is None:
        return {}
    return changed_files(Path(folder), own, trained)


def describe(processor: ProcessorConfig) -> str:
    """Return the limits in words."""
    return (
        f"images of {processor.image_min_pixels} to {processor.image_max_pixels} pixels, "
        f"{'frames' if processor.video_limits_per_frame else 'videos'} of "
        f"{processor.video_min_pixels} to {processor.video_max_pixels} pixels, "
        f"{processor.video_frames_per_second:g} frames per second, "
        f"{processor.video_min_frames} to {processor.video_max_frames} frames"
    )


def frame_sampling(processor: ProcessorConfig | None) -> FrameSampling:
    """Return which frames of a video a model sees."""
    if processor is None:
        return FrameSampling()
    return FrameSampling(
        frames_per_second=processor.video_frames_per_second,
        min_frames=processor.video_min_frames,
        max_frames=processor.video_max_frames,
        frames_per_patch=processor.temporal_patch_size
        if processor.video_limits_per_frame
        else None,
    )


def find_video_layout(folder: str | Path, config: Mapping[str, Any]) -> VideoLayout:
    """Return how a folder's family shows a video.

    Args:
        folder: For messages.
        config: Its config.json.

    Raises:
        ConfigError: The family is not supported, or config.json is incomplete.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ConfigError(
            f"{folder}/config.json: model_type is not supported, got {name!r}, expected one of "
            f"{', '.join(FAMILIES)}; use a folder of one of these families"
        )
    try:
        return family.video_layout(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}/config.json: its layout of videos is unusable, got {error}; correct the file"
        ) from error
    except KeyError as error:
        raise ConfigError(
            f"{folder}/config.json: the key {error} is missing, expected a complete "
            f"{family.title} config; download it again"
        ) from error

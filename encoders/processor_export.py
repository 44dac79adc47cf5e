"""Processor files with other settings than those of the folder that they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoders.config import SAMPLING, ProcessorConfig
from encoders.processor_files import VIDEO_FILE, Settings, read_json_object, read_settings

VIDEO_TYPE = "Qwen2VLVideoProcessor"
"""Of a folder without video settings of its own: those of the families whose videos are sized like
images.
"""
IMAGE_TYPES = ("image_processor_type", "feature_extractor_type")


def changed_files(folder: Path, config: ProcessorConfig) -> dict[str, bytes]:
    """Return the files, by name, in which transformers reads these settings and not the folder's.

    Files that need no change are left out. All other settings of a changed file stay.

    Args:
        folder: With processor files.
        config: Limits of pixels and sampling of frames; the rest is the folder's.

    Raises:
        ValueError: A file cannot be read.
    """
    image, video = read_settings(folder, config.video_limits_per_frame)
    images = _with_pixels(image.content, config.image_min_pixels, config.image_max_pixels)
    videos = _with_sampling(
        _with_pixels(video.content, config.video_min_pixels, config.video_max_pixels), config
    )
    if video == image and (images != image.content or videos != video.content):
        # A file of its own, so that images keep theirs.
        kept = {key: value for key, value in videos.items() if key not in IMAGE_TYPES}
        videos = {**kept, "video_processor_type": VIDEO_TYPE}
        video = Settings(VIDEO_FILE, "", {}, "")
    contents: dict[str, dict[str, Any]] = {}
    for found, wanted in ((image, images), (video, videos)):
        if wanted == found.content:
            continue
        if found.entry:
            whole = contents.setdefault(found.file, read_json_object(folder / found.file))
            whole[found.entry] = wanted
        else:
            contents[found.file] = wanted
    return {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in contents.items()
    }


def _with_pixels(settings: Mapping[str, Any], low: int, high: int) -> dict[str, Any]:
    """Return settings with other limits, in every spelling that they have them in."""
    changed = dict(settings)
    for old, new, value in (
        ("min_pixels", "shortest_edge", low),
        ("max_pixels", "longest_edge", high),
    ):
        if settings.get(old) is not None:
            changed[old] = value
        size = changed.get("size") or {}
        if settings.get(old) is None or size.get(new) is not None:
            changed["size"] = {**size, new: value}
    return changed


def _with_sampling(settings: Mapping[str, Any], config: ProcessorConfig) -> dict[str, Any]:
    """Return settings with another sampling; what says the same already stays out."""
    changed = dict(settings)
    for key, value in (
        ("fps", config.video_frames_per_second),
        ("min_frames", config.video_min_frames),
        ("max_frames", config.video_max_frames),
    ):
        stated = settings.get(key)
        if (SAMPLING[key] if stated is None else stated) != value:
            changed[key] = value
    if config.video_limits_per_frame and not settings.get("do_sample_frames"):
        # Left to themselves these processors take every frame.
        changed |= {"do_sample_frames": True, "fps": config.video_frames_per_second}
    elif settings.get("do_sample_frames") is False:
        changed["do_sample_frames"] = True
    return changed

"""Processor files with other settings than those of the folder that they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from encoders.config import ProcessorConfig
from encoders.processor_files import VIDEO_FILE, Settings, read_json_object, read_settings

VIDEO_TYPE = "Qwen2VLVideoProcessor"
"""Of a folder without video settings of its own: those of the families whose videos are sized like
images.
"""
SAMPLING = {
    "video_frames_per_second": "fps",
    "video_min_frames": "min_frames",
    "video_max_frames": "max_frames",
}
"""Fields of a `ProcessorConfig`, and what files call them."""
IMAGE_TYPES = ("image_processor_type", "feature_extractor_type")


def changed_files(folder: Path, own: ProcessorConfig, wanted: ProcessorConfig) -> dict[str, bytes]:
    """Return the files, by name, in which transformers reads other settings than the folder's.

    Files that need no change are left out. All other settings of a changed file stay.

    Args:
        folder: With processor files.
        own: What they say.
        wanted: The same with other limits of pixels or another sampling of frames.

    Raises:
        ValueError: A file cannot be read.
    """
    image, video = read_settings(folder, own.video_limits_per_frame)
    images, videos = dict(image.content), dict(video.content)
    if _differ(own, wanted, "image_min_pixels", "image_max_pixels"):
        _set_pixels(images, wanted.image_min_pixels, wanted.image_max_pixels)
    if _differ(own, wanted, "video_min_pixels", "video_max_pixels"):
        _set_pixels(videos, wanted.video_min_pixels, wanted.video_max_pixels)
    if _differ(own, wanted, *SAMPLING):
        videos |= {key: getattr(wanted, name) for name, key in SAMPLING.items()}
    if video == image and own != wanted:
        # A file of its own, so that images keep theirs.
        videos = {key: value for key, value in videos.items() if key not in IMAGE_TYPES}
        videos["video_processor_type"] = VIDEO_TYPE
        video = Settings(VIDEO_FILE, "", {}, "")
    contents: dict[str, dict[str, Any]] = {}
    for found, changed in ((image, images), (video, videos)):
        if changed == found.content:
            continue
        if found.entry:
            whole = contents.setdefault(found.file, read_json_object(folder / found.file))
            whole[found.entry] = changed
        else:
            contents[found.file] = changed
    return {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in contents.items()
    }


def _differ(own: ProcessorConfig, wanted: ProcessorConfig, *names: str) -> bool:
    return any(getattr(own, name) != getattr(wanted, name) for name in names)


def _set_pixels(settings: dict[str, Any], low: int, high: int) -> None:
    """Set other limits, in every spelling that the settings have them in."""
    for old, new, value in (
        ("min_pixels", "shortest_edge", low),
        ("max_pixels", "longest_edge", high),
    ):
        size = settings.get("size") or {}
        if settings.get(old) is None or size.get(new) is not None:
            settings["size"] = {**size, new: value}
        if settings.get(old) is not None:
            settings[old] = value

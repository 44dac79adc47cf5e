"""The configuration of a vision tower and its processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from encoders.processor_files import Settings, read_json_object, read_settings

NO_OVERRIDES: Mapping[str, int | float] = MappingProxyType({})
CLIP_TOKENS = 128_000
"""Tokens that the frames of a clip share, if limits of pixels hold for every frame."""
FRAME_TOKENS = 768
"""Tokens of a frame, if limits of pixels hold for a clip."""
VIDEO_FRACTION = 0.9
SAMPLING_DEFAULTS: Mapping[str, int | float] = {"fps": 2, "min_frames": 4, "max_frames": 768}
"""Frame sampling of a folder that says nothing of it, as most published ones: what transformers'
video processors have, and qwen-vl-utils where those take every frame.
"""
STEPS: Mapping[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True, None),
    "resample": (3, None),
}
"""Settings of transformers' processors that have one value here: every step is taken, and sizes
change bicubically.
"""
SIZES = ("patch_size", "temporal_patch_size", "merge_size")
PROCESSORS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5")
"""How the names of transformers' classes begin that make such patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLayout:
    """How a family shows a video to its language model, and what its limits of pixels count.

    Attributes:
        timestamped: Every temporal patch is a run of placeholders of its own, after its time in
            words. Otherwise all of them are one run, and time goes into the rotary positions.
        tokens_per_second: Steps of the time axis in a second, of a video that is one run.
        limits_per_frame: The limits hold for every frame, and frames are sampled in whole temporal
            patches, as by transformers' `Qwen2VLVideoProcessor`. Otherwise the limits hold for all
            sampled frames of a clip together, and these lie evenly from the first to the last, as
            by `Qwen3VLVideoProcessor`.
    """

    timestamped: bool = True
    tokens_per_second: float = 0.0
    limits_per_frame: bool = False


TIMESTAMPED = VideoLayout()
"""Most families' way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    """How pixels become patches, and which frames of a video do, by a folder's processor files."""

    patch_size: int
    """Side of a square patch in pixels."""
    temporal_patch_size: int
    """Frames per temporal patch; an image repeats its one frame."""
    merge_size: int
    """Patches per side that the tower merges into one feature."""
    image_min_pixels: int
    image_max_pixels: int
    video_min_pixels: int
    """Least pixels of a whole sampled video (frames x height x width), or of each frame."""
    video_max_pixels: int
    video_limits_per_frame: bool = False
    """Whether the two limits above are of each frame."""
    video_shared_pixels: int | None = None
    """Pixels that the frames of a video share evenly: each has at most its part of them, where
    limits are per frame.
    """
    video_frame_pixels: int | None = None
    """Most pixels of a frame, where limits are those of a whole video."""
    video_frames_per_second: float = SAMPLING_DEFAULTS["fps"]
    """Rate at which frames are sampled."""
    video_min_frames: int = int(SAMPLING_DEFAULTS["min_frames"])
    video_max_frames: int = int(SAMPLING_DEFAULTS["max_frames"])
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float = 1 / 255

    @property
    def merged_patch_pixels(self) -> int:
        """Side in pixels of the square that becomes one feature; heights and widths are multiples
        of it.
        """
        return self.patch_size * self.merge_size


def read_processor_config(
    folder: str | Path,
    layout: VideoLayout = TIMESTAMPED,
    overrides: Mapping[str, int | float] = NO_OVERRIDES,
) -> ProcessorConfig:
    """Read a Hugging Face folder's image and video processor settings.

    Args:
        folder: The model's folder.
        layout: The family's way with videos.
        overrides: Fields of the result that are not to be those of the folder.

    Raises:
        ValueError: A file is missing, is not a JSON object, lacks a key, image and video disagree
            on the patches, a minimum is above its maximum, or an override allows less than a patch.
    """
    image, video = read_settings(Path(folder), layout.limits_per_frame)
    config = replace(
        _processor_config(Path(folder), layout, image, video), **dict[str, Any](overrides)
    )
    for low, high in (
        ("image_min_pixels", "image_max_pixels"),
        ("video_min_pixels", "video_max_pixels"),
        ("video_min_frames", "video_max_frames"),
    ):
        if getattr(config, low) > getattr(config, high):
            raise ValueError(
                f"{folder}: {low} is above {high}, got {getattr(config, low)} and "
                f"{getattr(config, high)} from the folder's processor files and the keys of data, "
                "expected at most the same; change one of them"
            )
    if "video_max_frames" in overrides and config.video_max_frames < config.temporal_patch_size:
        raise ValueError(
            f"{folder}: video_max_frames is less than a temporal patch, got "
            f"{config.video_max_frames} from the keys of data, expected at least "
            f"{config.temporal_patch_size}; transformers could show no video to the exported model"
        )
    return config


def _processor_config(
    folder: Path, layout: VideoLayout, images: Settings, videos: Settings
) -> ProcessorConfig:
    image, video = images.content, videos.content
    _check_same(images, videos)
    for each in (images, videos):
        _check_steps(each.content, each.name)
    sizes = {key: _positive_integer(image, key, images.name) for key in SIZES}
    _check_tower(folder, sizes, images.name)
    if not all(_triple(image, "image_std", images.name)):
        raise ValueError(
            f"{images.name}: wrong image_std, got {image['image_std']}, expected numbers other "
            "than 0; correct the file"
        )
    image_min, image_max = _pixel_limits(image, images.name)
    video_min, video_max = _pixel_limits(video, videos.name, layout.limits_per_frame)
    caps_frames = bool(video.get("cap_pixels_per_frame"))
    return ProcessorConfig(
        **sizes,
        image_min_pixels=image_min,
        image_max_pixels=image_max,
        video_min_pixels=video_min,
        video_max_pixels=video_max,
        video_limits_per_frame=layout.limits_per_frame,
        video_shared_pixels=_shared_pixels(video, sizes, videos.name)
        if caps_frames and layout.limits_per_frame
        else None,
        video_frame_pixels=_max_pixels(video, FRAME_TOKENS, sizes, videos.name)
        if caps_frames and not layout.limits_per_frame
        else None,
        **_sampling(video, videos.name),
        image_mean=_triple(image, "image_mean", images.name),
        image_std=_triple(image, "image_std", images.name),
        rescale_factor=_rescale_factor(image, images.name),
    )


def _check_same(images: Settings, videos: Settings) -> None:
    """Refuse what images and videos may not differ in, since one tower reads both."""
    readers: dict[str, Callable[[Mapping[str, Any], str, str], object]] = {
        **dict.fromkeys(SIZES, _positive_integer),
        **dict.fromkeys(("image_mean", "image_std"), _triple),
        "rescale_factor": lambda settings, key, name: _rescale_factor(settings, name),
    }
    for key, read in readers.items():
        expected, got = (read(each.content, key, each.name) for each in (images, videos))
        if got != expected:
            raise ValueError(
                f"{videos.name}: {key} differs from {images.name}, got {got}, expected {expected}; "
                "one tower reads both, so make them equal"
            )


def _check_steps(settings: Mapping[str, Any], name: str) -> None:
    """Refuse a processor that leaves out a step, interpolates in another way, or is of another
    kind.
    """
    for key, allowed in STEPS.items():
        value = settings.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{name}: {key} is not supported, got {value!r}, expected {allowed[0]!r}; use the "
                "model's own processor files"
            )
    for key in ("image_processor_type", "video_processor_type", "feature_extractor_type"):
        kind = settings.get(key)
        if kind is not None and not str(kind).startswith(PROCESSORS):
            raise ValueError(
                f"{name}: {key} is not supported, got {kind!r}, expected one of "
                f"{', '.join(f'{start}*' for start in PROCESSORS)}; use the model's own processor "
                "files"
            )


def _check_tower(folder: Path, sizes: Mapping[str, int], name: str) -> None:
    """Compare the patches with those that the folder's tower takes."""
    path = folder / "config.json"
    vision = read_json_object(path).get("vision_config") if path.is_file() else None
    if not isinstance(vision, dict):
        return
    for key, tower_key in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        if vision.get(tower_key, sizes[key]) != sizes[key]:
            raise ValueError(
                f"{name}: {key} is not that of the tower, got {sizes[key]}, expected "
                f"{vision[tower_key]!r} by vision_config.{tower_key} of config.json; use the "
                "model's own processor files"
            )


def _rescale_factor(settings: Mapping[str, Any], name: str) -> float:
    value = settings.get("rescale_factor", 1 / 255)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"{name}: wrong rescale_factor, got {value!r}, expected a positive number; correct the "
            "file"
        )
    return float(value)


def _positive_integer(settings: Mapping[str, Any], key: str, name: str) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name}: wrong {key}, got {value!r}, expected a positive integer; correct the file"
        )
    return value


def _triple(settings: Mapping[str, Any], key: str, name: str) -> tuple[float, float, float]:
    value = settings.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
        raise ValueError(
            f"{name}: wrong {key}, got {value!r}, expected three numbers; correct the file"
        )
    return float(value[0]), float(value[1]), float(value[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pixel_limits(
    settings: Mapping[str, Any], name: str, has_old_keys: bool = True
) -> tuple[int, int]:
    """Return least and most pixels.

    Args:
        settings: Of one processor.
        name: Of these in error messages.
        has_old_keys: Whether `min_pixels` and `max_pixels` take precedence over `size`. The video
            processor of Qwen3-VL does not know them.
    """
    size = settings.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(
            f"{name}: wrong size, got {size!r}, expected an object with shortest_edge and "
            "longest_edge; correct the file"
        )
    old = settings if has_old_keys else {}
    low = old.get("min_pixels") or size.get("shortest_edge")
    high = old.get("max_pixels") or size.get("longest_edge")
    if type(low) is not int or type(high) is not int or not 0 < low <= high:
        spelling = " or min_pixels and max_pixels" if has_old_keys else ""
        raise ValueError(
            f"{name}: no usable pixel limits, got min {low!r} and max {high!r}, expected 0 < min "
            f"<= max as size.shortest_edge and size.longest_edge{spelling}; correct the file"
        )
    return low, high


def _sampling(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields that say which frames are sampled."""
    given = {
        key: default if settings.get(key) is None else settings[key]
        for key, default in SAMPLING_DEFAULTS.items()
    }
    if settings.get("num_frames") is not None:
        raise ValueError(
            f"{name}: num_frames is not supported, got {settings['num_frames']!r}, expected fps; "
            "remove it and set fps, min_frames and max_frames"
        )
    if not _is_number(given["fps"]) or given["fps"] <= 0:
        raise ValueError(
            f"{name}: wrong fps, got {given['fps']!r}, expected a positive number; correct the file"
        )
    return {
        "video_frames_per_second": float(given["fps"]),
        "video_min_frames": _positive_integer(given, "min_frames", name),
        "video_max_frames": _positive_integer(given, "max_frames", name),
    }


def _shared_pixels(settings: Mapping[str, Any], sizes: Mapping[str, int], name: str) -> int:
    """Return the pixels that a video's frames share: nine tenths of a context of so many tokens.

    Source: transformers, `Qwen2VLVideoProcessor`; the fraction that is not for text is that of
    qwen-vl-utils.
    """
    pixels = _max_pixels(settings, CLIP_TOKENS, sizes, name)
    return int(pixels * VIDEO_FRACTION) * sizes["temporal_patch_size"]


def _max_pixels(
    settings: Mapping[str, Any], default_tokens: int, sizes: Mapping[str, int], name: str
) -> int:
    """Return the pixels of as many tokens as a frame of a clip, or all frames, may have.

    Source: transformers, `Qwen3VLVideoProcessor` for a frame.
    """
    key = "max_video_tokens"
    tokens = _positive_integer({key: default_tokens, **settings}, key, name)
    return tokens * (sizes["patch_size"] * sizes["merge_size"]) ** 2

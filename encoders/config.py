"""The configuration of a vision tower and its processor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
JOINT_FILE = "processor_config.json"
DEFAULT_VIDEO_TOKENS = 128_000
VIDEO_FRACTION = 0.9
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
PROCESSORS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5")
"""How the names of transformers' classes begin that make such patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLayout:
    """How a family shows a video to its language model, and what its limits of pixels count.

    Attributes:
        timestamped: Every temporal patch is a run of placeholders of its own, after its time in
            words. Otherwise all of them are one run, and time goes into the rotary positions.
        tokens_per_second: Steps of the time axis in a second, of a video that is one run.
        limits_per_frame: The limits hold for every frame. Otherwise for all sampled frames of a
            clip together.
    """

    timestamped: bool = True
    tokens_per_second: float = 0.0
    limits_per_frame: bool = False


TIMESTAMPED = VideoLayout()
"""Most families' way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    """How pixels become patches; read from a folder's `preprocessor_config.json` and
    `video_preprocessor_config.json`.
    """

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
    """Pixels that the frames of a video share evenly, where limits are per frame: each has at most
    its part of them.
    """
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float = 1 / 255

    @property
    def merged_patch_pixels(self) -> int:
        """Side in pixels of the square that becomes one feature; heights and widths are multiples
        of it.
        """
        return self.patch_size * self.merge_size


def read_processor_config(folder: str | Path, layout: VideoLayout = TIMESTAMPED) -> ProcessorConfig:
    """Read a Hugging Face folder's image and video processor settings.

    The two settings come from `preprocessor_config.json` and `video_preprocessor_config.json`, or
    from the entries `image_processor` and `video_processor` of `processor_config.json`. Where
    limits of pixels hold for every frame, the settings of images are also those of videos if there
    are no others, as in folders written before videos had a file of their own.

    Args:
        folder: The model's folder.
        layout: The family's way with videos.

    Raises:
        ValueError: A file is missing, is not a JSON object, lacks a key, or image and video
            disagree on the patches.
    """
    image, image_name = _settings(Path(folder), IMAGE_FILE, "image_processor")
    if layout.limits_per_frame and not _has_settings(Path(folder), VIDEO_FILE, "video_processor"):
        video, video_name = image, image_name
    else:
        video, video_name = _settings(Path(folder), VIDEO_FILE, "video_processor")
    keys = ("patch_size", "temporal_patch_size", "merge_size")
    sizes = {key: _positive_integer(image, key, image_name) for key in keys}
    for key in keys:
        if _positive_integer(video, key, video_name) != sizes[key]:
            raise ValueError(
                f"{video_name}: {key} differs from {image_name}, got {video[key]}, expected "
                f"{sizes[key]}; one tower reads both, so make them equal"
            )
    for key in ("image_mean", "image_std"):
        if _triple(video, key, video_name) != _triple(image, key, image_name):
            raise ValueError(
                f"{video_name}: {key} differs from {image_name}, got {video[key]}, expected "
                f"{image[key]}; one tower reads both, so make them equal"
            )
    _check_steps(image, image_name)
    _check_steps(video, video_name)
    if video.get("cap_pixels_per_frame") and not layout.limits_per_frame:
        raise ValueError(
            f"{video_name}: cap_pixels_per_frame is not supported here, got true, expected false; "
            "remove it"
        )
    rescale_factor = _rescale_factor(image, image_name)
    if _rescale_factor(video, video_name) != rescale_factor:
        raise ValueError(
            f"{video_name}: rescale_factor differs from {image_name}, got "
            f"{_rescale_factor(video, video_name)}, expected {rescale_factor}; one tower reads "
            "both, so make them equal"
        )
    _check_tower(Path(folder), sizes, image_name)
    if not all(_triple(image, "image_std", image_name)):
        raise ValueError(
            f"{image_name}: wrong image_std, got {image['image_std']}, expected numbers other than "
            "0; correct the file"
        )
    image_min, image_max = _pixel_limits(image, image_name)
    video_min, video_max = _pixel_limits(video, video_name)
    return ProcessorConfig(
        patch_size=sizes["patch_size"],
        temporal_patch_size=sizes["temporal_patch_size"],
        merge_size=sizes["merge_size"],
        image_min_pixels=image_min,
        image_max_pixels=image_max,
        video_min_pixels=video_min,
        video_max_pixels=video_max,
        video_limits_per_frame=layout.limits_per_frame,
        video_shared_pixels=_shared_pixels(video, sizes, video_name)
        if layout.limits_per_frame
        else None,
        image_mean=_triple(image, "image_mean", image_name),
        image_std=_triple(image, "image_std", image_name),
        rescale_factor=rescale_factor,
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


def _has_settings(folder: Path, file_name: str, joint_key: str) -> bool:
    joint = folder / JOINT_FILE
    return (folder / file_name).is_file() or (
        joint.is_file() and isinstance(read_json_object(joint).get(joint_key), dict)
    )


def _settings(folder: Path, file_name: str, joint_key: str) -> tuple[Mapping[str, Any], str]:
    """Return one processor's settings and its name in error messages."""
    path = folder / file_name
    if path.is_file():
        return read_json_object(path), str(path)
    joint = folder / JOINT_FILE
    if joint.is_file():
        inner = read_json_object(joint).get(joint_key)
        if isinstance(inner, dict):
            return inner, f"{joint} ({joint_key})"
    raise ValueError(
        f"{folder}: no processor settings, got neither {file_name} nor {joint_key} in "
        f"{JOINT_FILE}, expected one of them; copy the file from the original model folder"
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        ValueError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not readable as JSON, got {error}, expected a JSON object; restore the file"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: wrong content, got {type(content).__name__}, expected a JSON object; restore "
            "the file"
        )
    return content


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


def _pixel_limits(settings: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Return least and most pixels; `min_pixels` and `max_pixels` take precedence over `size`, as
    in transformers.
    """
    size = settings.get("size") or {}
    if not isinstance(size, dict):
        raise ValueError(
            f"{name}: wrong size, got {size!r}, expected an object with shortest_edge and "
            "longest_edge; correct the file"
        )
    low = settings.get("min_pixels") or size.get("shortest_edge")
    high = settings.get("max_pixels") or size.get("longest_edge")
    if type(low) is not int or type(high) is not int or not 0 < low <= high:
        raise ValueError(
            f"{name}: no usable pixel limits, got min {low!r} and max {high!r}, expected 0 < min "
            "<= max as size.shortest_edge and size.longest_edge or min_pixels and max_pixels; "
            "correct the file"
        )
    return low, high


def _shared_pixels(settings: Mapping[str, Any], sizes: Mapping[str, int], name: str) -> int | None:
    """Return the pixels that a video's frames share if the file asks for that: nine tenths of a
    context of so many tokens.

    Source: transformers, `Qwen2VLVideoProcessor`; the fraction that is not for text is that of
    qwen-vl-utils.
    """
    if not settings.get("cap_pixels_per_frame"):
        return None
    tokens = _positive_integer(
        {"max_video_tokens": DEFAULT_VIDEO_TOKENS, **settings}, "max_video_tokens", name
    )
    features = int(tokens * (sizes["patch_size"] * sizes["merge_size"]) ** 2 * VIDEO_FRACTION)
    return features * sizes["temporal_patch_size"]

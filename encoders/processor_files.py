"""The files of a Hugging Face folder that hold processor settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEO_FILE = "video_preprocessor_config.json"
JOINT_FILE = "processor_config.json"
_IMAGES = ("preprocessor_config.json", "image_processor")
_VIDEOS = (VIDEO_FILE, "video_processor")


@dataclass(frozen=True, slots=True)
class Settings:
    """One processor's settings as a folder has them.

    Attributes:
        file: Name of the file.
        entry: Under which key of it; empty where they are the whole file.
        content: The settings.
        name: Of these in error messages.
    """

    file: str
    entry: str
    content: Mapping[str, Any]
    name: str


def read_settings(folder: Path, videos_are_images: bool) -> tuple[Settings, Settings]:
    """Return the image and the video processor's settings, from where transformers reads them.

    They are the entries `image_processor` and `video_processor` of `processor_config.json`, or else
    `preprocessor_config.json` and `video_preprocessor_config.json`.

    Args:
        folder: The model's folder.
        videos_are_images: Whether the settings of images are also those of videos if there are no
            others, as in folders written before videos had a file of their own.

    Raises:
        ValueError: A file is missing or not a JSON object.
    """
    image = _find(folder, *_IMAGES)
    return image, _find(folder, *_VIDEOS, image if videos_are_images else None)


def _find(folder: Path, file_name: str, entry: str, others: Settings | None = None) -> Settings:
    """Return the settings of an entry of the joint file, or of a file, or else some others."""
    joint = folder / JOINT_FILE
    if joint.is_file():
        inner = read_json_object(joint).get(entry)
        if isinstance(inner, dict):
            return Settings(JOINT_FILE, entry, inner, f"{joint} ({entry})")
    path = folder / file_name
    if path.is_file():
        return Settings(file_name, "", read_json_object(path), str(path))
    if others is not None:
        return others
    raise ValueError(
        f"{folder}: no processor settings, got neither {file_name} nor {entry} in {JOINT_FILE}, "
        "expected one of them; copy the file from the original model folder"
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

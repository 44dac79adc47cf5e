"""What a vision tower and its processor are told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    """How pixels become patches; read from a folder's `preprocessor_config.json` and `video_preprocessor_config.json`."""

    patch_size: int
    """Side of a square patch in pixels."""
    temporal_patch_size: int
    """Frames per temporal patch; an image repeats its one frame."""
    merge_size: int
    """Patches per side that the tower merges into one feature."""
    image_min_pixels: int
    image_max_pixels: int
    video_min_pixels: int
    """Least pixels of a whole sampled video (frames x height x width)."""
    video_max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float = 1 / 255

"""Settings of processor files, as published folders have them."""

from __future__ import annotations

from typing import Any

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def patch_settings(
    patch_size: int, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF
) -> dict[str, Any]:
    """Return what images and videos have in common."""
    sizes = {"patch_size": patch_size, "temporal_patch_size": 2, "merge_size": 2}
    return {**sizes, "image_mean": list(mean), "image_std": list(std)}


QWEN2_5_VL: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    **patch_settings(14, CLIP_MEAN, CLIP_STD),
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
"""Qwen2.5-VL's file, from before videos had one of their own."""

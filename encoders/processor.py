"""Images and video frames to patches and their (t, h, w) grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class VisionInput:
    """One processed image or video.

    Attributes:
        kind: `image` or `video`.
        patches: `[t * h * w, channels * temporal_patch_size * patch_size * patch_size]` float32.
        grid: `(t, h, w)` in patches.
        timestamps: Seconds, one per temporal patch of a video; empty for an image.
    """

    kind: Literal["image", "video"]
    patches: npt.NDArray[np.float32]
    grid: tuple[int, int, int]
    timestamps: tuple[float, ...] = ()

"""Open an image or a video that a question names, within limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Frames:
    """Decoded pixels.

    Attributes:
        pixels: `[frames, height, width, 3]` uint8 RGB; one frame for an image.
        timestamps: Seconds of each frame from the start of the clip; `(0.0,)` for an image.
    """

    pixels: npt.NDArray[np.uint8]
    timestamps: tuple[float, ...]

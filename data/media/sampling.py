"""Which frames of a video are shown; runs in the decoding process."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data.errors import DataError

UNKNOWN_RATE = 24.0
"""Frames per second of a clip that does not say its own, as in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampling:
    """How frames are chosen from a clip, as transformers' video processors do.

    The defaults are those of `Qwen3VLVideoProcessor`.

    Attributes:
        frames_per_second: Rate of sampling.
        min_frames: Least frames of a clip that has as many.
        max_frames: Most frames; a longer clip is sampled more sparsely.
        frames_per_patch: Their number is a multiple of this, and they are the first frames of equal
            parts of the clip. `None`: they lie evenly from the first frame to the last.
    """

    frames_per_second: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    frames_per_patch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no clip could be sampled by.

        Raises:
            DataError: A number is not positive, or the least is more than the most.
        """
        if not (
            0 < self.frames_per_second < math.inf
            and 0 < self.min_frames <= self.max_frames
            and (self.frames_per_patch is None or self.frames_per_patch > 0)
        ):
            raise DataError(
                f"FrameSampling: no usable numbers, got {self}, expected a positive rate and "
                "0 < min_frames <= max_frames; correct data.video_min_frames and "
                "data.video_max_frames"
            )

    def choose(self, num_frames: int, clip_rate: float) -> list[int]:
        """Return the indices of the chosen frames, ascending.

        Source: transformers, `sample_frames` of `Qwen3VLVideoProcessor` and
        `Qwen2VLVideoProcessor`. The latter fails where less than a patch can be taken; here as
        many frames are taken as there are.

        Args:
            num_frames: Of the clip.
            clip_rate: Its frames per second.
        """
        wanted = num_frames / clip_rate * self.frames_per_second
        if self.frames_per_patch is None:
            count = min(max(int(wanted), self.min_frames), self.max_frames, num_frames)
            indices: list[int] = np.linspace(0, num_frames - 1, count).round().astype(int).tolist()
            return indices
        size = self.frames_per_patch
        most = min(self.max_frames, num_frames) // size * size
        count = int(min(max(wanted, self.min_frames), most) // size * size)
        count = count or min(size, self.max_frames, num_frames)
        return [int(index * (num_frames / count)) for index in range(count)]


def usable_rate(stated: float) -> float:
    """Return a clip's frames per second, `UNKNOWN_RATE` if what it states is no rate."""
    return stated if 0 < stated < math.inf else UNKNOWN_RATE

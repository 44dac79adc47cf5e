"""Three-axis rotary positions (time, height, width) for text, image and video runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from encoders.config import TIMESTAMPED, VideoLayout

IntArray = npt.NDArray[np.int64]
Grid = tuple[int, int, int]

ROUNDING = 1e-6
"""Far below a step of the time axis and far above float64's rounding: a rate that gives whole steps
must not fall one short.
"""


def mrope_positions(
    token_ids: IntArray,
    grids: Sequence[Grid],
    image_token_id: int,
    video_token_id: int,
    merge_size: int,
    layout: VideoLayout = TIMESTAMPED,
    seconds_per_patch: Sequence[float] = (),
) -> tuple[IntArray, int]:
    """Return the rotary positions of a prompt whose placeholders are expanded.

    A text token has the same next position on all three axes. An image's placeholders form
    one run of its whole grid. A video's form one run per temporal patch, with text between them, or
    one run of its whole grid, by the family's layout. Inside a run starting at position p the axes
    are p + (time, row, column) of the merged grid; time counts temporal patches, but in a video of
    one run steps of so many per second, rounded down. What follows a run starts after the largest
    position in it.

    The last rule is that of Qwen's own code, vLLM and transformers up to 5.2. Later transformers
    (5.23 is known) begin what follows a Qwen2.5-VL video at p + max(rows, columns), so that text
    has times that the video has already taken; elsewhere the two are one rule.

    Args:
        token_ids: `[tokens]`.
        grids: `(t, h, w)` in patches of every image and video, in prompt order.
        image_token_id: Placeholder of images.
        video_token_id: Placeholder of videos.
        merge_size: Patches per side of one feature.
        layout: How the family shows videos.
        seconds_per_patch: Per grid the seconds from one temporal patch to the next; read only where
            a video is one run.

    Returns:
        `[3, tokens]` positions, and the position of the token after the last.

    Raises:
        ValueError: A run does not fit its grid, there are more or fewer grids than runs, or seconds
            are missing.

    Source: transformers, `Qwen3_5Model.get_rope_index` and `Qwen2_5_VLModel.get_rope_index`.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    positions = np.empty((3, len(ids)), dtype=np.int64)
    pending = _PendingGrids(grids, layout, seconds_per_patch)
    next_position = 0
    for start, end in _equal_runs(ids, image_token_id, video_token_id):
        length = end - start
        kind = (
            "image"
            if ids[start] == image_token_id
            else "video"
            if ids[start] == video_token_id
            else "text"
        )
        if kind == "text":
            positions[:, start:end] = next_position + np.arange(length)
            next_position += length
            continue
        grid, steps_per_patch = pending.take(kind, start)
        t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
        if t * h * w != length:
            raise ValueError(
                f"mrope_positions: run of {kind} placeholders at token {start} does not fit its "
                f"grid, got {length} tokens, expected {t * h * w} for grid {grid} merged by "
                f"{merge_size}; expand the placeholders from the same grids"
            )
        axes = np.indices((t, h, w)).reshape(3, -1)
        axes[0] = np.floor(axes[0] * steps_per_patch + ROUNDING)
        positions[:, start:end] = next_position + axes
        next_position += int(axes.max()) + 1
    pending.check_empty()
    return positions, next_position


class _PendingGrids:
    """Hands out the grid of each run: images whole, videos whole or one temporal patch at a
    time.
    """

    def __init__(
        self, grids: Sequence[Grid], layout: VideoLayout, seconds_per_patch: Sequence[float]
    ) -> None:
        if not layout.timestamped and len(seconds_per_patch) != len(grids):
            raise ValueError(
                f"mrope_positions: seconds do not fit the grids, got {len(seconds_per_patch)}, "
                f"expected {len(grids)}, one per image and video; pass those of the processed media"
            )
        self._grids = list(grids)
        self._layout = layout
        self._seconds_per_patch = seconds_per_patch
        self._index = 0
        self._frames_taken = 0

    def take(self, kind: str, token: int) -> tuple[Grid, float]:
        """Return the grid of the next run and the steps of the time axis from one of its temporal
        patches to the next.
        """
        if self._index == len(self._grids):
            raise ValueError(
                f"mrope_positions: {kind} placeholders at token {token} have no grid, got "
                f"{len(self._grids)} grids in all, expected one per image and video; pass the "
                "grids of all media"
            )
        t, h, w = self._grids[self._index]
        if kind == "image":
            if self._frames_taken:
                raise ValueError(
                    f"mrope_positions: image placeholders at token {token} inside a video, got "
                    f"{self._frames_taken} of its {t} temporal patches, expected all of them "
                    "first; keep media in prompt order"
                )
            self._index += 1
            return (t, h, w), 1.0
        if not self._layout.timestamped:
            self._index += 1
            return (t, h, w), self._layout.tokens_per_second * self._seconds_per_patch[
                self._index - 1
            ]
        self._frames_taken += 1
        if self._frames_taken == t:
            self._index, self._frames_taken = self._index + 1, 0
        return (1, h, w), 1.0

    def check_empty(self) -> None:
        left = len(self._grids) - self._index
        if left:
            raise ValueError(
                f"mrope_positions: {left} grids are left over, got {len(self._grids)} grids with "
                f"{self._index} used up, expected placeholders for every one; expand the "
                "placeholders from the same grids"
            )


def _equal_runs(ids: IntArray, image_token_id: int, video_token_id: int) -> list[tuple[int, int]]:
    """Return start and end of the maximal runs of image, video and other tokens."""
    if not len(ids):
        return []
    kinds = np.where(ids == image_token_id, 1, np.where(ids == video_token_id, 2, 0))
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    return list(pairwise(cuts))

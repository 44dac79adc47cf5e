"""Three-axis rotary positions (time, height, width) for text, image and video runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Grid = tuple[int, int, int]


def mrope_positions(
    token_ids: IntArray, grids: Sequence[Grid], image_token_id: int, video_token_id: int, merge_size: int
) -> tuple[IntArray, int]:
    """Return the rotary positions of a prompt whose placeholders are expanded.

    A text token stands at the same next position on all three axes. An image's placeholders form one run of its whole grid; a
    video's form one run per temporal patch, with text between them. Inside a run starting at position p the axes are
    p + (frame, row, column) of the merged grid, and what follows starts at p + max(h, w) / merge_size.

    Args:
        token_ids: `[tokens]`.
        grids: `(t, h, w)` in patches of every image and video, in prompt order.
        image_token_id: Placeholder of images.
        video_token_id: Placeholder of videos.
        merge_size: Patches per side of one feature.

    Returns:
        `[3, tokens]` positions, and the position of the token after the last.

    Raises:
        ValueError: A run does not fit its grid, or there are more or fewer grids than runs.

    Source: transformers, `Qwen3_5Model.get_rope_index`.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    positions = np.empty((3, len(ids)), dtype=np.int64)
    pending = _PendingGrids(grids)
    start_position = 0
    for start, end in _equal_runs(ids, image_token_id, video_token_id):
        length = end - start
        kind = "image" if ids[start] == image_token_id else "video" if ids[start] == video_token_id else "text"
        if kind == "text":
            positions[:, start:end] = start_position + np.arange(length)
            start_position += length
            continue
        grid = pending.take(kind, start)
        t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
        if t * h * w != length:
            raise ValueError(
                f"mrope_positions: run of {kind} placeholders at token {start} does not fit its grid, got {length} tokens, "
                f"expected {t * h * w} for grid {grid} merged by {merge_size}; expand the placeholders from the same grids"
            )
        positions[:, start:end] = start_position + np.indices((t, h, w)).reshape(3, -1)
        start_position += max(h, w)
    pending.check_empty()
    return positions, start_position


class _PendingGrids:
    """Hands out the grid of each run: images whole, videos one temporal patch at a time."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self._grids = list(grids)
        self._index = 0
        self._frames_taken = 0

    def take(self, kind: str, token: int) -> Grid:
        if self._index == len(self._grids):
            raise ValueError(
                f"mrope_positions: {kind} placeholders at token {token} have no grid, got {len(self._grids)} grids in all, "
                "expected one per image and video; pass the grids of all media"
            )
        t, h, w = self._grids[self._index]
        if kind == "image":
            if self._frames_taken:
                raise ValueError(
                    f"mrope_positions: image placeholders at token {token} inside a video, got {self._frames_taken} of its {t} "
                    "temporal patches, expected all of them first; keep media in prompt order"
                )
            self._index += 1
            return t, h, w
        self._frames_taken += 1
        if self._frames_taken == t:
            self._index, self._frames_taken = self._index + 1, 0
        return 1, h, w

    def check_empty(self) -> None:
        left = len(self._grids) - self._index
        if left:
            raise ValueError(
                f"mrope_positions: {left} grids are left over, got {len(self._grids)} grids with {self._index} used up, "
                "expected placeholders for every one; expand the placeholders from the same grids"
            )


def _equal_runs(ids: IntArray, image_token_id: int, video_token_id: int) -> list[tuple[int, int]]:
    """Return start and end of the maximal runs of image, video and other tokens."""
    if not len(ids):
        return []
    kinds = np.where(ids == image_token_id, 1, np.where(ids == video_token_id, 2, 0))
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    return list(pairwise(cuts))

"""Rotary positions: numbers frozen from transformers 5.23, arithmetic by hand where it departs from
the models' own rule.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from encoders.config import TIMESTAMPED, VideoLayout
from encoders.positions import mrope_positions

IMAGE, VIDEO, START, END = 120, 121, 122, 123
ONE_RUN = VideoLayout(timestamped=False, tokens_per_second=2.0, limits_per_frame=True)

# Two images of 2 x 3 and 1 x 2 features, then a video of 4 temporal patches of 1 x 2 features, and
# two text tokens.
MEDIA_THEN_VIDEO = [
    5,
    START,
    *[IMAGE] * 6,
    END,
    6,
    7,
    START,
    *[IMAGE] * 2,
    END,
    START,
    *[VIDEO] * 8,
    END,
    8,
    9,
]
GRIDS = [(1, 4, 6), (1, 2, 4), (4, 2, 4)]
BEFORE = [
    [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 9, 9, 11, 12],
    [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9, 9, 11, 12],
    [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
]
ROWS, COLUMNS = [13] * 8, [13, 14] * 4
# By frames per second: seconds per temporal patch of two frames, the time axis of the video
# (transformers), and where text goes on (largest + 1; transformers 5.23 says 15 at every rate, 13 +
# the two columns).
RATES = {
    2.0: (1.0, [13, 13, 15, 15, 17, 17, 19, 19], 20),
    3.0: (2 / 3, [13, 13, 14, 14, 15, 15, 17, 17], 18),
    1.0: (2.0, [13, 13, 17, 17, 21, 21, 25, 25], 26),
    # 0.8 steps per patch: 0, 0.8, 1.6 and 2.4, rounded down
    5.0: (0.4, [13, 13, 13, 13, 14, 14, 15, 15], 16),
}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


@pytest.mark.parametrize("rate", RATES)
def test_a_video_in_one_run_is_placed_by_its_seconds(rate: float) -> None:
    seconds, times, following = RATES[rate]
    positions, next_position = mrope_positions(
        np.array(MEDIA_THEN_VIDEO), GRIDS, IMAGE, VIDEO, 2, ONE_RUN, [0.0, 0.0, seconds]
    )
    after = [following, following + 1, following + 2]
    assert positions.tolist() == [
        [*before, *run, *after] for before, run in zip(BEFORE, (times, ROWS, COLUMNS), strict=True)
    ]
    assert next_position == following + 3


def test_videos_of_different_rates_in_one_prompt_by_hand() -> None:
    ids = [5, START, *[VIDEO] * 6, END, START, *[IMAGE] * 4, END, START, *[VIDEO] * 3, END]
    grids = [(3, 2, 4), (1, 8, 2), (3, 2, 2)]
    positions, next_position = mrope_positions(
        np.array(ids), grids, IMAGE, VIDEO, 2, ONE_RUN, [1.25, 0.0, 2.0]
    )
    # First video from 2: steps of 2.5 give times 2, 2 + 2, 2 + 5, its end at 8. Image from 10, four
    # rows: its end at 14. Second video from 16: steps of 4 give 16, 20, 24, its end at 25.
    assert positions[0].tolist() == numbers("0 1 2 2 4 4 7 7 8 9 10 10 10 10 14 15 16 20 24 25")
    assert positions[1].tolist() == numbers("0 1 2 2 2 2 2 2 8 9 10 11 12 13 14 15 16 16 16 25")
    assert positions[2].tolist() == numbers("0 1 2 3 2 3 2 3 8 9 10 10 10 10 14 15 16 16 16 25")
    assert next_position == 26


def test_a_wide_short_video_ends_at_its_columns() -> None:
    # one temporal patch of 1 x 4 features from 1 on: its end at 1 + 4
    positions, _ = mrope_positions(
        np.array([START, *[VIDEO] * 4, END]), [(1, 2, 8)], IMAGE, VIDEO, 2, ONE_RUN, [1.0]
    )
    assert positions.tolist() == [[0, 1, 1, 1, 1, 5], [0, 1, 1, 1, 1, 5], [0, 1, 2, 3, 4, 5]]


def test_no_rate_falls_a_step_short_by_rounding() -> None:
    for num_frames in range(2, 65, 3):
        for tenths in range(1, 400, 7):
            seconds = tenths / 10 / num_frames * 2
            num_patches = num_frames // 2
            ids = np.full(num_patches, VIDEO)
            positions, _ = mrope_positions(
                ids, [(num_patches, 2, 2)], IMAGE, VIDEO, 2, ONE_RUN, [seconds]
            )
            exact = [
                int(Fraction(tenths * 4 * patch, 10 * num_frames)) for patch in range(num_patches)
            ]
            assert positions[0].tolist() == exact, (num_frames, tenths)


def test_timestamped_videos_are_frames_between_text() -> None:
    # An image, a video of three temporal patches of 1 x 2 features after their times, an image;
    # frozen from Qwen3-VL.
    frames = [token for time in (7, 8, 9) for token in (6, time, START, VIDEO, VIDEO, END)]
    ids = [5, START, *[IMAGE] * 6, END, *frames, START, *[IMAGE] * 3, END, 8]
    positions, next_position = mrope_positions(
        np.array(ids), [(1, 4, 6), (3, 2, 4), (1, 6, 2)], IMAGE, VIDEO, 2
    )
    same = [
        0,
        1,
        *[2] * 6,
        5,
        6,
        7,
        8,
        9,
        9,
        11,
        12,
        13,
        14,
        15,
        15,
        17,
        18,
        19,
        20,
        21,
        21,
        23,
        24,
        25,
        25,
        25,
        28,
        29,
    ]
    rows, columns = same.copy(), same.copy()
    rows[2:8], rows[28:31] = [2, 2, 2, 3, 3, 3], [25, 26, 27]
    columns[2:8] = [2, 3, 4, 2, 3, 4]
    for first in (12, 18, 24):
        columns[first + 1] += 1
    assert positions.tolist() == [same, rows, columns]
    assert next_position == 30


def test_the_layouts_differ_in_runs_and_seconds() -> None:
    run = np.array([VIDEO] * 4)
    with pytest.raises(
        ValueError,
        match=(
            r"run of video placeholders at token 0 does not fit its grid, got 4 tokens, expected 1"
        ),
    ):
        mrope_positions(run, [(4, 2, 2)], IMAGE, VIDEO, 2, TIMESTAMPED)
    with pytest.raises(
        ValueError,
        match=r"seconds do not fit the grids, got 0, expected 1, one per image and video",
    ):
        mrope_positions(run, [(4, 2, 2)], IMAGE, VIDEO, 2, ONE_RUN)
    with pytest.raises(ValueError, match=r"got 4 tokens, expected 8"):
        mrope_positions(run, [(8, 2, 2)], IMAGE, VIDEO, 2, ONE_RUN, [1.0])
    with pytest.raises(ValueError, match=r"video placeholders at token 5 have no grid"):
        mrope_positions(
            np.array([*run, START, VIDEO]), [(4, 2, 2)], IMAGE, VIDEO, 2, ONE_RUN, [1.0]
        )

"""Which frames of a clip are shown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from data.errors import DataError
from data.media.sampling import UNKNOWN_RATE, FrameSampling, usable_rate


@pytest.mark.parametrize(
    "clip_rate", [1.0, 10.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 60.0, None]
)
@pytest.mark.parametrize(("rate", "fewest", "most"), [(2.0, 4, 768), (0.7, 1, 5), (30.0, 9, 40)])
def test_evenly_chosen_frames_are_those_of_transformers(
    clip_rate: float | None, rate: float, fewest: int, most: int
) -> None:
    # The whole processor needs torchvision; it is the oracle of whole clips in another test.
    settings = SimpleNamespace(fps=rate, min_frames=fewest, max_frames=most)
    sampling = FrameSampling(frames_per_second=rate, min_frames=fewest, max_frames=most)
    for num_frames in [*range(1, 300), 5000, 123_457]:
        about = VideoMetadata(total_num_frames=num_frames, fps=clip_rate)
        expected = Qwen3VLVideoProcessor.sample_frames(settings, about, fps=rate).tolist()
        assert sampling.choose(num_frames, usable_rate(clip_rate or 0.0)) == expected


def test_choice_of_frames_by_hand() -> None:
    evenly, whole = FrameSampling(), FrameSampling(frames_per_patch=2)
    assert evenly.choose(1, 25.0) == whole.choose(1, 25.0) == [0]
    assert evenly.choose(3, 30.0) == [0, 1, 2], "never more than there are"
    assert whole.choose(3, 30.0) == [0, 1], "whole patches"
    # 30 frames at 10 per second are 3 s, 6 frames at 2 per second: 29 / 5 = 5.8 apart, or the
    # first frames of 6 parts of 5
    assert evenly.choose(30, 10.0) == [0, 6, 12, 17, 23, 29]
    assert whole.choose(30, 10.0) == [0, 5, 10, 15, 20, 25]
    # 8 frames are 0.8 s, but 4 frames are the least
    assert evenly.choose(8, 10.0) == [0, 2, 5, 7]
    assert whole.choose(8, 10.0) == [0, 2, 4, 6]
    few = FrameSampling(max_frames=5, frames_per_patch=2)
    assert few.choose(1000, 10.0) == [0, 250, 500, 750], "5 frames are 2 whole patches"
    one = FrameSampling(min_frames=1, max_frames=1, frames_per_patch=2)
    assert one.choose(1000, 10.0) == [0], "less than a patch"


@pytest.mark.parametrize("clip_rate", [1.0, 10.0, 23.976, 24.0, 29.97, 60.0, 1e-6, 1e9])
@pytest.mark.parametrize("frames_per_patch", [None, 1, 2, 3])
def test_chosen_frames_are_there_and_as_many_as_asked_for(
    clip_rate: float, frames_per_patch: int | None
) -> None:
    sampling = FrameSampling(min_frames=4, max_frames=30, frames_per_patch=frames_per_patch)
    for num_frames in range(1, 200):
        chosen = sampling.choose(num_frames, clip_rate)
        assert chosen == sorted(set(chosen))
        assert chosen[0] == 0
        assert chosen[-1] < num_frames
        assert len(chosen) <= 30
        if frames_per_patch is None:
            assert len(chosen) >= min(4, num_frames)
            assert len(chosen) == 1 or chosen[-1] == num_frames - 1
        elif num_frames >= frames_per_patch:
            assert len(chosen) % frames_per_patch == 0


def test_a_clip_without_a_rate_has_that_of_transformers() -> None:
    assert usable_rate(29.97) == 29.97
    for stated in (0.0, -1.0, float("nan"), float("inf")):
        assert usable_rate(stated) == UNKNOWN_RATE


@pytest.mark.parametrize(
    "wrong",
    [{"frames_per_second": 0.0}, {"min_frames": 9, "max_frames": 8}, {"frames_per_patch": 0}],
)
def test_sampling_that_chooses_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="FrameSampling: no usable numbers"):
        FrameSampling(**wrong)  # type: ignore[arg-type]

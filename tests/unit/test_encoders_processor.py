"""Images and videos become the patches that transformers makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as reference_frame_size,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    smart_resize as reference_video_size,
)

from encoders.config import (
    ProcessorConfig,
    VideoLayout,
)
from encoders.processor import process_image, process_video, video_size
from tests.support.processor_settings import CLIP_MEAN, CLIP_STD

CONFIG = ProcessorConfig(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    image_min_pixels=4096,
    image_max_pixels=40_000,
    video_min_pixels=8192,
    video_max_pixels=150_000,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
)
ONE_RUN = VideoLayout(timestamped=False, tokens_per_second=2.0, limits_per_frame=True)
PER_FRAME = replace(
    CONFIG,
    patch_size=14,
    video_min_pixels=3136,
    video_max_pixels=20_000,
    video_limits_per_frame=True,
)


def expected_video_size(frames: int, size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    height, width = reference_video_size(
        num_frames=frames,
        height=size[0],
        width=size[1],
        factor=32,
        temporal_factor=2,
        min_pixels=8192,
        max_pixels=max_pixels,
    )
    return height, width


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (20, 33), (700, 500), (3, 400), (32, 32)])
def test_image_equals_transformers_bit_for_bit(size: tuple[int, int]) -> None:
    pixels = random_pixels(*size)
    oracle = Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": CONFIG.image_min_pixels, "longest_edge": CONFIG.image_max_pixels},
        image_mean=list(CONFIG.image_mean),
        image_std=list(CONFIG.image_std),
    )(Image.fromarray(pixels), return_tensors="np")
    result = process_image(pixels, CONFIG)
    assert [list(result.grid)] == oracle["image_grid_thw"].tolist()
    assert result.patches.dtype == np.float32
    assert np.array_equal(result.patches, oracle["pixel_values"])
    assert result.timestamps == ()


@pytest.mark.parametrize("frames", [2, 3, 5, 8, 21])
@pytest.mark.parametrize("size", [(64, 64), (17, 60), (300, 200), (48, 1000)])
def test_video_size_equals_transformers(frames: int, size: tuple[int, int]) -> None:
    assert video_size(frames, *size, CONFIG) == expected_video_size(frames, size, 150_000)


def test_video_patches_equal_transformers_on_frames_that_need_no_resizing() -> None:
    import torch

    frames = random_pixels(5, 64, 96)
    result = process_video(frames, [0.0, 0.5, 1.0, 1.5, 2.0], CONFIG)
    table = (frames.astype(np.float64) / 255).astype(np.float32)
    normalised = (table - np.float32(CONFIG.image_mean)) / np.float32(CONFIG.image_std)
    batch = torch.from_numpy(normalised.transpose(0, 3, 1, 2))[None]
    # Only the cutting is taken from the oracle: its resizing needs torchvision.
    expected, t, h, w = Qwen3VLVideoProcessor.patchify(
        None, batch, patch_size=16, merge_size=2, temporal_patch_size=2
    )
    assert result.grid == (t, h, w) == (3, 4, 6)
    assert np.array_equal(result.patches, expected[0].numpy())
    assert result.timestamps == (0.25, 1.25, 2.0)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("size", [(64, 64), (17, 60), (300, 200), (9, 1000), (56, 84)])
def test_frames_with_limits_of_their_own_are_sized_as_transformers_does(
    frames: int, size: tuple[int, int]
) -> None:
    # The video processor of transformers has the same function, which without torchvision cannot be
    # imported from there.
    expected = reference_frame_size(*size, factor=28, min_pixels=3136, max_pixels=20_000)
    assert video_size(frames, *size, PER_FRAME) == expected


@pytest.mark.parametrize("size", [(64, 96), (300, 200), (20, 33)])
def test_frames_with_limits_of_their_own_are_the_patches_of_images(size: tuple[int, int]) -> None:
    still, moved = random_pixels(*size), random_pixels(*size)[::-1].copy()
    result = process_video(np.stack([still, still, moved, moved]), [0.0, 0.5, 1.0, 1.5], PER_FRAME)
    oracle = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 20_000},
        image_mean=list(CONFIG.image_mean),
        image_std=list(CONFIG.image_std),
    )([Image.fromarray(still), Image.fromarray(moved)], return_tensors="np")
    # An image is a temporal patch of the same frame twice.
    assert [[1, *result.grid[1:]]] * 2 == oracle["image_grid_thw"].tolist()
    assert np.array_equal(result.patches, oracle["pixel_values"])


@pytest.mark.parametrize("frames", [2, 5, 40])
@pytest.mark.parametrize("size", [(64, 64), (300, 200), (48, 1000)])
def test_frames_may_have_a_limit_besides_that_of_the_video(
    frames: int, size: tuple[int, int]
) -> None:
    # 10 tokens of 32 x 32 pixels a frame, an even share, and a little more than the least size
    limit = max(min(10_240, 150_000 // frames), int(8192 * 1.05))
    expected = expected_video_size(frames, size, frames * limit)
    assert video_size(frames, *size, replace(CONFIG, video_frame_pixels=10_240)) == expected


def test_frames_may_share_a_number_of_pixels() -> None:
    shared = replace(PER_FRAME, video_shared_pixels=200_000)
    # 20 frames have 10,000 pixels each: 84 x 112 is the largest of that shape in 28s; 10 frames
    # have what one frame may have.
    assert video_size(20, 300, 400, shared) == (84, 112)
    assert (
        video_size(10, 300, 400, shared)
        == video_size(1, 300, 400, shared)
        == video_size(1, 300, 400, PER_FRAME)
    )
    # 200 frames would have 1,000 each, but none gets less than 1.05 times the least: 12,600 pixels,
    # which 112 x 112 are not above.
    assert video_size(200, 280, 280, replace(shared, video_min_pixels=12_000)) == (112, 112)


def test_seconds_per_patch_come_from_the_rate_or_the_timestamps() -> None:
    frames = random_pixels(5, 64, 64)
    # A clip of 24 frames per second at 5: the timestamps fall on its frames, 0.2 s apart only on
    # average.
    timestamps = [0.083, 0.292, 0.5, 0.667, 0.875]
    assert process_video(frames, timestamps, CONFIG, 0.2).seconds_per_patch == 0.4
    assert process_video(frames, timestamps, CONFIG).seconds_per_patch == pytest.approx(
        2 * (0.875 - 0.083) / 4, abs=1e-9
    )
    assert (
        process_video(frames[:1], [0.5], CONFIG).seconds_per_patch
        == process_image(frames[0], CONFIG).seconds_per_patch
        == 0.0
    )


def test_one_frame_is_one_temporal_patch() -> None:
    result = process_video(random_pixels(1, 64, 64), [3.0], CONFIG)
    assert result.grid[0] == 1
    assert result.timestamps == (3.0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: process_image(np.zeros((4, 4), np.uint8), CONFIG),
            r"process_image: wrong pixels, got uint8 \(4, 4\)",
        ),
        (
            lambda: process_image(np.zeros((4, 4, 3), np.float32), CONFIG),
            "wrong pixels, got float32",
        ),
        (lambda: process_image(random_pixels(1, 201), CONFIG), "sides differ too much, got 1x201"),
        (
            lambda: process_video(random_pixels(2, 8, 8), [0.0], CONFIG),
            "timestamps do not fit, got 1, expected 2",
        ),
        (
            lambda: process_video(np.zeros((0, 8, 8, 3), np.uint8), [], CONFIG),
            "process_video: wrong pixels",
        ),
    ],
)
def test_refusals_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

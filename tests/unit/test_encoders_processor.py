"""Images and videos become the patches that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as reference_video_size

from encoders.config import ProcessorConfig, read_processor_config
from encoders.processor import process_image, process_video, video_size

CONFIG = ProcessorConfig(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    image_min_pixels=4096,
    image_max_pixels=40_000,
    video_min_pixels=8192,
    video_max_pixels=150_000,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)


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
    expected = reference_video_size(
        num_frames=frames, height=size[0], width=size[1], factor=32, temporal_factor=2, min_pixels=8192, max_pixels=150_000
    )
    assert video_size(frames, *size, CONFIG) == expected


def test_video_patches_equal_transformers_on_frames_that_need_no_resizing() -> None:
    import torch

    frames = random_pixels(5, 64, 96)
    result = process_video(frames, [0.0, 0.5, 1.0, 1.5, 2.0], CONFIG)
    table = (frames.astype(np.float64) / 255).astype(np.float32)
    normalised = (table - np.float32(CONFIG.image_mean)) / np.float32(CONFIG.image_std)
    batch = torch.from_numpy(normalised.transpose(0, 3, 1, 2))[None]
    # Only the cutting is taken from the oracle: its resizing needs torchvision.
    expected, t, h, w = Qwen3VLVideoProcessor.patchify(None, batch, patch_size=16, merge_size=2, temporal_patch_size=2)
    assert result.grid == (t, h, w) == (3, 4, 6)
    assert np.array_equal(result.patches, expected[0].numpy())
    assert result.timestamps == (0.25, 1.25, 2.0)


def test_one_frame_is_one_temporal_patch() -> None:
    result = process_video(random_pixels(1, 64, 64), [3.0], CONFIG)
    assert result.grid[0] == 1
    assert result.timestamps == (3.0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: process_image(np.zeros((4, 4), np.uint8), CONFIG), r"process_image: wrong pixels, got uint8 \(4, 4\)"),
        (lambda: process_image(np.zeros((4, 4, 3), np.float32), CONFIG), "wrong pixels, got float32"),
        (lambda: process_image(random_pixels(1, 201), CONFIG), "sides differ too much, got 1x201"),
        (lambda: process_video(random_pixels(2, 8, 8), [0.0], CONFIG), "timestamps do not fit, got 1, expected 2"),
        (lambda: process_video(np.zeros((0, 8, 8, 3), np.uint8), [], CONFIG), "process_video: wrong pixels"),
    ],
)
def test_refusals_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def write_configs(folder: Path, **video_changes: object) -> None:
    shared = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image = shared | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    video = shared | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}} | video_changes
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def test_reads_a_folder(tmp_path: Path) -> None:
    write_configs(tmp_path)
    config = read_processor_config(tmp_path)
    assert (config.image_min_pixels, config.image_max_pixels) == (65536, 16777216)
    assert (config.video_min_pixels, config.video_max_pixels) == (4096, 25165824)
    assert config.merged_patch_pixels == 32
    write_configs(tmp_path, min_pixels=10, max_pixels=20)
    assert read_processor_config(tmp_path).video_max_pixels == 20


def test_reads_the_joint_file(tmp_path: Path) -> None:
    write_configs(tmp_path)
    expected = read_processor_config(tmp_path)
    joint = {}
    for key, name in (("image_processor", "preprocessor_config.json"), ("video_processor", "video_preprocessor_config.json")):
        joint[key] = json.loads((tmp_path / name).read_text())
        (tmp_path / name).unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(joint))
    assert read_processor_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 14}, "patch_size differs from .*, got 14, expected 16"),
        ({"merge_size": 0}, "wrong merge_size, got 0"),
        ({"image_mean": [0.1] * 3}, "image_mean differs"),
        ({"image_std": [0.5]}, "wrong image_std"),
        ({"size": {"height": 3}}, "no usable pixel limits, got min None and max None"),
        ({"size": 3}, "wrong size, got 3"),
    ],
)
def test_folder_errors(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_configs(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_processor_config(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no processor settings, got neither preprocessor_config\.json"):
        read_processor_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_processor_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="got list, expected a JSON object"):
        read_processor_config(tmp_path)

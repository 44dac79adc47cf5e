"""Processor settings are read from a folder as transformers reads them, and written back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from encoders.config import STEPS, TIMESTAMPED, VideoLayout, read_processor_config
from encoders.processor_export import changed_files
from tests.support.processor_settings import CLIP_MEAN, CLIP_STD, QWEN2_5_VL, patch_settings

ONE_RUN = VideoLayout(timestamped=False, tokens_per_second=2.0, limits_per_frame=True)


def write_configs(folder: Path, **video_changes: object) -> None:
    shared = patch_settings(16)
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
    assert (
        config.video_frames_per_second, config.video_min_frames, config.video_max_frames
    ) == (2, 4, 768)  # fmt: skip
    write_configs(tmp_path, min_pixels=10, max_pixels=20, fps=1, min_frames=3, max_frames=9)
    config = read_processor_config(tmp_path)
    # The video processor of Qwen3-VL knows `size` alone, that of Qwen2.5-VL both.
    assert config.video_max_pixels == 25165824
    assert (
        config.video_frames_per_second, config.video_min_frames, config.video_max_frames
    ) == (1, 3, 9)  # fmt: skip
    assert read_processor_config(tmp_path, ONE_RUN).video_max_pixels == 20


def test_keys_take_precedence_over_the_folder(tmp_path: Path) -> None:
    write_configs(tmp_path)
    overrides = {"image_max_pixels": 70_000, "video_max_frames": 5}
    config = read_processor_config(tmp_path, overrides=overrides)
    assert config == replace(read_processor_config(tmp_path), **overrides)
    with pytest.raises(
        ValueError,
        match=r"image_min_pixels is above image_max_pixels, got 65536 and 100 .*change one",
    ):
        read_processor_config(tmp_path, overrides={"image_max_pixels": 100})
    with pytest.raises(ValueError, match="video_min_frames is above video_max_frames, got 4 and 3"):
        read_processor_config(tmp_path, overrides={"video_max_frames": 3})
    with pytest.raises(ValueError, match="video_max_frames is less than a temporal patch, got 1"):
        read_processor_config(tmp_path, overrides={"video_min_frames": 1, "video_max_frames": 1})
    with pytest.raises(ValueError, match="video_min_pixels is above video_max_pixels"):
        read_processor_config(tmp_path, overrides={"video_max_pixels": 4095})


def changed(folder: Path, layout: VideoLayout = TIMESTAMPED, **overrides: float) -> dict[str, Any]:
    """Return the changed files, written into the folder."""
    config = read_processor_config(folder, layout, overrides)
    files = changed_files(folder, read_processor_config(folder, layout), config)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert read_processor_config(folder, layout) == config
    assert changed_files(folder, config, config) == {}
    return {name: json.loads(content) for name, content in files.items()}


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    write_configs(tmp_path, max_frames=10, extra={"kept": [1]})
    assert changed(tmp_path) == {}
    assert changed(tmp_path, video_max_frames=10) == {}
    image = json.loads((tmp_path / "preprocessor_config.json").read_text())
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert changed(tmp_path, image_max_pixels=70_000) == {
        "preprocessor_config.json": image
        | {"size": {"shortest_edge": 65536, "longest_edge": 70_000}}
    }
    assert changed(tmp_path, video_max_frames=20, video_frames_per_second=0.5) == {
        "video_preprocessor_config.json": video | {"fps": 0.5, "min_frames": 4, "max_frames": 20}
    }


def test_the_joint_file_and_the_old_keys_are_changed_too(tmp_path: Path) -> None:
    write_configs(tmp_path)
    image = json.loads((tmp_path / "preprocessor_config.json").read_text())
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    old = image | {"min_pixels": 65536, "max_pixels": 80_000}
    joint = {"processor_class": "P", "image_processor": old, "video_processor": video}
    (tmp_path / "processor_config.json").write_text(json.dumps(joint))
    assert changed(tmp_path, image_max_pixels=70_000) == {
        "processor_config.json": joint
        | {
            "image_processor": old
            | {"max_pixels": 70_000, "size": {"shortest_edge": 65536, "longest_edge": 70_000}},
            "video_processor": video,
        }
    }


def test_videos_get_a_file_where_they_had_that_of_images(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(QWEN2_5_VL))
    kept = {key: value for key, value in QWEN2_5_VL.items() if key != "image_processor_type"}
    kind = {"video_processor_type": "Qwen2VLVideoProcessor"}
    assert changed(tmp_path, ONE_RUN) == {}
    assert changed(tmp_path, ONE_RUN, image_max_pixels=20_000) == {
        "preprocessor_config.json": QWEN2_5_VL | {"max_pixels": 20_000},
        "video_preprocessor_config.json": kept | kind,
    }


def test_reads_the_joint_file(tmp_path: Path) -> None:
    write_configs(tmp_path)
    expected = read_processor_config(tmp_path)
    joint = {}
    for key, name in (
        ("image_processor", "preprocessor_config.json"),
        ("video_processor", "video_preprocessor_config.json"),
    ):
        joint[key] = json.loads((tmp_path / name).read_text())
        (tmp_path / name).unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(joint))
    assert read_processor_config(tmp_path) == expected


def test_reads_a_folder_of_before_videos_had_a_file(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(QWEN2_5_VL))
    config = read_processor_config(tmp_path, ONE_RUN)
    assert (config.merged_patch_pixels, config.image_mean, config.image_std) == (
        28,
        CLIP_MEAN,
        CLIP_STD,
    )
    assert (
        (config.video_min_pixels, config.video_max_pixels)
        == (3136, 12845056)
        == (config.image_min_pixels, config.image_max_pixels)
    )
    assert (config.video_limits_per_frame, config.video_shared_pixels) == (True, None)
    # transformers reads the same, by a method that all its video processors share; this family's
    # own needs torchvision.
    assert Qwen3VLVideoProcessor.get_video_processor_dict(tmp_path)[0] == QWEN2_5_VL
    with pytest.raises(
        ValueError,
        match=(
            r"got neither video_preprocessor_config\.json nor video_processor in "
            r"processor_config\.json"
        ),
    ):
        read_processor_config(tmp_path)
    own = QWEN2_5_VL | {
        "max_pixels": 50_000,
        "cap_pixels_per_frame": True,
        "max_video_tokens": 1000,
    }
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": own}))
    config = read_processor_config(tmp_path, ONE_RUN)
    # 900 of 1,000 tokens of 28 x 28 pixels and two frames
    assert (config.image_max_pixels, config.video_max_pixels, config.video_shared_pixels) == (
        12845056,
        50_000,
        900 * 784 * 2,
    )
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"video_processor": own | {"max_video_tokens": 0}})
    )
    with pytest.raises(ValueError, match="wrong max_video_tokens, got 0"):
        read_processor_config(tmp_path, ONE_RUN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 14}, "patch_size differs from .*, got 14, expected 16"),
        ({"merge_size": 0}, "wrong merge_size, got 0"),
        ({"image_mean": [0.1] * 3}, "image_mean differs"),
        ({"image_std": [0.5]}, "wrong image_std"),
        ({"size": {"height": 3}}, "no usable pixel limits, got min None and max None"),
        ({"size": 3}, "wrong size, got 3"),
        (
            {"size": {"shortest_edge": True, "longest_edge": 5}},
            "no usable pixel limits, got min True and max 5",
        ),
        ({"do_resize": False}, "do_resize is not supported, got False, expected True"),
        ({"do_rescale": False}, "do_rescale is not supported, got False"),
        ({"do_normalize": False}, "do_normalize is not supported, got False"),
        ({"resample": 2}, "resample is not supported, got 2, expected 3"),
        ({"rescale_factor": 1.0}, "rescale_factor differs from .*, got 1.0, expected 0.0039"),
        ({"rescale_factor": "1/255"}, "wrong rescale_factor, got '1/255'"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "wrong image_mean, got"),
        (
            {"video_processor_type": "VivitImageProcessor"},
            r"video_processor_type is not supported, got 'VivitImageProcessor', .* Qwen2VL\*",
        ),
        (
            {"cap_pixels_per_frame": True, "max_video_tokens": 0},
            "wrong max_video_tokens, got 0",
        ),
        ({"num_frames": 8}, "num_frames is not supported, got 8, expected fps"),
        ({"fps": 0}, "wrong fps, got 0, expected a positive number"),
        ({"fps": "2"}, "wrong fps, got '2'"),
        ({"min_frames": 0}, "wrong min_frames, got 0"),
        ({"min_frames": 9, "max_frames": 8}, "video_min_frames is above video_max_frames"),
    ],
)
def test_folder_errors(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_configs(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_processor_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 14),
        ("temporal_patch_size", 1),
        ("spatial_merge_size", 4),
        ("patch_size", [16, 16]),
    ],
)
def test_patches_must_be_those_of_the_tower(tmp_path: Path, key: str, value: object) -> None:
    write_configs(tmp_path)
    tower = {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": tower}))
    read_processor_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {**tower, key: value}}))
    with pytest.raises(
        ValueError,
        match=(
            rf"preprocessor_config\.json: .* is not that of the tower, got \d+, expected .* "
            rf"vision_config\.{key}"
        ),
    ):
        read_processor_config(tmp_path)


def test_what_is_refused_is_what_transformers_has_settings_for() -> None:
    # A step of a newer transformers would be left out here in silence.
    steps = {name for name in vars(Qwen2VLImageProcessorPil) if name.startswith("do_")} | {
        "resample"
    }
    assert steps == set(STEPS)
    read = {
        "size",
        "default_to_square",
        "image_mean",
        "image_std",
        "patch_size",
        "temporal_patch_size",
        "merge_size",
    }
    settings = {
        name
        for name, value in vars(Qwen2VLImageProcessorPil).items()
        if not callable(value) and not name.startswith("_")
    }
    assert settings - steps - read <= {"valid_kwargs", "model_input_names"}


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no processor settings, got neither preprocessor_config\.json"
    ):
        read_processor_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_processor_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="got list, expected a JSON object"):
        read_processor_config(tmp_path)

"""Prompts with images and videos are those that transformers' processor of the same folder makes:
tokens, timestamps, grids, pixels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from data.media.opening import Frames, MediaLimits, MediaOpener
from data.question import MediaKind, MediaRef, Question, Turn
from tests.support.processor_oracle import Case, Processed, ask_transformers
from tests.support.processor_settings import QWEN2_5_VL, patch_settings
from tests.support.tiny_folder import build_folder
from tests.unit.test_data_orientation import with_matrix
from tests.unit.test_data_video import clip_file, encode
from zppo_mm.rollout.processor import changed_processor_files, frame_sampling, read_processor
from zppo_mm.rollout.prompt import PromptEncoder

pytestmark = pytest.mark.medium

FLOAT_TOLERANCE = 1e-5  # transformers divides by the standard deviation in bytes, in another order
TORCHVISION_BYTES = 17
"""That resized bytes differ at most where torchvision resizes, which unlike Pillow does not clip
between its two passes: 2 in most cases, 16 in pictures of noise.
"""
PUBLISHED = patch_settings(16) | {"processor_class": "Qwen3VLProcessor"}
IMAGES = PUBLISHED | {
    "size": {"shortest_edge": 9216, "longest_edge": 40_960},
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEOS = PUBLISHED | {
    "size": {"shortest_edge": 8192, "longest_edge": 100_000},
    "video_processor_type": "Qwen3VLVideoProcessor",
}
OLD = QWEN2_5_VL | {"max_pixels": 20_000}
OVERRIDES = {
    "image_min_pixels": 20_000,
    "image_max_pixels": 60_000,
    "video_max_pixels": 60_000,
    "video_frames_per_second": 3.0,
    "video_min_frames": 6,
    "video_max_frames": 9,
}


@dataclass(frozen=True)
class Layout:
    """Processor files of a family, and what a run sets besides."""

    family: str
    files: dict[str, Any]
    overrides: dict[str, int | float]


def two(image: dict[str, Any], video: dict[str, Any]) -> dict[str, Any]:
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


def joint(image: dict[str, Any], video: dict[str, Any]) -> dict[str, Any]:
    # The old files beside it are those that transformers does not read.
    return {
        "processor_config.json": {"image_processor": image, "video_processor": video},
        **two(image | {"size": {"shortest_edge": 1, "longest_edge": 2}}, {}),
    }


SAMPLED = {"fps": 4, "min_frames": 2, "max_frames": 12}
OLD_VIDEO = OLD | {"video_processor_type": "Qwen2VLVideoProcessor"}
LAYOUTS = {
    "qwen3_5": Layout("qwen3_5", two(IMAGES, VIDEOS), {}),
    "qwen3_5 keys": Layout("qwen3_5", two(IMAGES, VIDEOS), OVERRIDES),
    "qwen3_vl": Layout("qwen3_vl", joint(IMAGES, VIDEOS | SAMPLED), {}),
    "qwen3_vl keys": Layout("qwen3_vl", joint(IMAGES, VIDEOS | SAMPLED), OVERRIDES),
    "qwen3_vl capped": Layout(
        "qwen3_vl", two(IMAGES, VIDEOS | {"cap_pixels_per_frame": True, "max_video_tokens": 6}), {}
    ),
    "qwen2_5_vl": Layout("qwen2_5_vl", {"preprocessor_config.json": OLD}, {}),
    "qwen2_5_vl keys": Layout("qwen2_5_vl", {"preprocessor_config.json": OLD}, OVERRIDES),
    "qwen2_5_vl capped": Layout(
        "qwen2_5_vl",
        two(OLD, OLD_VIDEO | SAMPLED | {"cap_pixels_per_frame": True, "max_video_tokens": 100}),
        {},
    ),
}
SIZES = {
    "narrow": (300, 9),
    "too narrow": (603, 3),
    "tiny": (3, 5),
    "huge": (900, 700),
    "exact": (96, 128),
    "odd": (101, 77),
}
MODES = ("L", "LA", "RGBA", "P", "1", "CMYK")
NUM_FRAMES = (1, 2, 3, 5, 7, 8, 45)
CLIPS = ("bikes", "carphone_pristine")
CLOCKWISE = (0, 1, -1, 0)
ASKED = "What is it?"
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Look at everything."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "First: "},
            {"type": "image", "name": "odd"},
            {"type": "video", "name": "7 frames"},
            {"type": "text", "text": " What are\nthey? "},
        ],
    },
    {"role": "assistant", "content": "Noise, and a clip."},
    {
        "role": "user",
        "content": [
            {"type": "image", "name": "RGBA"},
            {"type": "text", "text": "and "},
            {"type": "image", "name": "tiny"},
            {"type": "text", "text": ", before "},
            {"type": "video", "name": "slow"},
            {"type": "text", "text": "?"},
        ],
    },
]
"""As Hugging Face chat templates take it, with the names of the media besides."""


@dataclass(frozen=True)
class Media:
    """The files of a test by name."""

    images: dict[str, Path]
    videos: dict[str, Path]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    folder = tmp_path_factory.mktemp("media")
    draw = np.random.default_rng(0)
    images = {}
    for name, (height, width) in SIZES.items():
        images[name] = folder / f"{name}.png"
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            images[name]
        )
    for mode in MODES:
        picture = Image.fromarray(draw.integers(0, 256, (60, 90, 4), dtype=np.uint8), "RGBA")
        images[mode] = folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        (picture if mode == "RGBA" else picture.convert("RGB").convert(mode)).save(images[mode])
    clear = Image.fromarray(draw.integers(0, 4, (60, 90), dtype=np.uint8), "P")
    clear.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    images["clear palette"] = folder / "clear.png"
    clear.save(images["clear palette"], transparency=2)
    videos = {name: clip_file(name) for name in CLIPS}
    for count in NUM_FRAMES:
        path = folder / f"{count}.mp4"
        path.write_bytes(encode(noise(count)))
        videos[f"{count} frames"] = path
    slow = folder / "slow.mp4"
    slow.write_bytes(encode(noise(30), rate=1))
    videos["slow"] = slow
    turned = folder / "turned.mp4"
    turned.write_bytes(with_matrix(encode(noise(9)), b"tkhd", CLOCKWISE))
    videos["turned"] = turned
    return Media(images, videos)


def noise(count: int, height: int = 120, width: int = 200) -> list[np.ndarray]:
    """Return frames that differ, in blocks that a codec keeps."""
    blocks = np.random.default_rng(count).integers(
        0, 256, (count, height // 10, width // 10, 3), dtype=np.uint8
    )
    return list(blocks.repeat(10, axis=1).repeat(10, axis=2))


@dataclass(frozen=True)
class Asked:
    """A prompt of ours, and transformers' case of the same.

    Attributes:
        name: What is shown.
        layout: Of the folder.
        encoder: Of the folder and the keys.
        question: With the media.
        case: With the folder that an export would have.
    """

    name: str
    layout: str
    encoder: PromptEncoder
    question: Question
    case: Case
    text: str = ASKED


def conversation(folder: Path, exported: Path, media: Media, encoder: PromptEncoder) -> Asked:
    """Return our reading of `TALK`, and its rendering by transformers."""
    shown = [part for turn in TALK for part in turn["content"] if isinstance(part, dict)]
    named = [part for part in shown if part["type"] != "text"]
    turns = [
        Turn(
            turn["role"],
            "".join(
                part if isinstance(part, str) else part.get("text", f"<{part['type']}>")
                for part in turn["content"]
            ),
        )
        for turn in TALK
    ]
    refs = tuple(MediaRef(part["type"], "", part["name"], "") for part in named)
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True
    )
    return Asked(
        "conversation",
        "",
        encoder,
        Question("q", turns[-1].text, refs, "1", "math", earlier=tuple(turns[:-1])),
        Case(
            exported,
            with_bare_videos(encoder, rendered),
            tuple(media.images[ref.key] for ref in refs if ref.kind == "image"),
            tuple(media.videos[ref.key] for ref in refs if ref.kind == "video"),
        ),
        turns[-1].text,
    )


def open_media(media: Media, opener: MediaOpener, ref: MediaRef) -> Frames:
    path = media.images[ref.key] if ref.kind == "image" else media.videos[ref.key]
    return opener.open(path.read_bytes(), ref.kind)


@pytest.fixture(scope="module")
def asked(media: Media, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Asked]]:
    openers: list[MediaOpener] = []
    cases = []
    for title, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("source")
        write_folder(folder, layout)
        exported = tmp_path_factory.mktemp("exported")
        shutil.copytree(folder, exported, dirs_exist_ok=True)
        for name, content in changed_processor_files(folder, layout.overrides).items():
            (exported / name).write_bytes(content)
        sampling = frame_sampling(read_processor(folder, layout.overrides))
        openers.append(MediaOpener(MediaLimits(sampling=sampling)))
        encoder = PromptEncoder(
            folder, partial(open_media, media, openers[-1]), overrides=layout.overrides
        )
        shown: list[list[tuple[str, MediaKind]]] = [
            *([(name, "image")] for name in media.images),
            *([(name, "video")] for name in media.videos),
            [("odd", "image"), ("7 frames", "video"), ("RGBA", "image"), ("slow", "video")],
        ]
        for entries in shown:
            refs = tuple(MediaRef(kind, "", name, "") for name, kind in entries)
            question = Question("q", "", refs, "1", "math")
            cases.append(
                Asked(
                    "+".join(name for name, _ in entries),
                    title,
                    encoder,
                    question,
                    Case(
                        exported,
                        bare(encoder, [kind for _, kind in entries]),
                        tuple(media.images[name] for name, kind in entries if kind == "image"),
                        tuple(media.videos[name] for name, kind in entries if kind == "video"),
                    ),
                )
            )
        talked = conversation(folder, exported, media, encoder)
        cases.append(replace(talked, layout=title))
    yield cases
    for opener in openers:
        opener.close()


def write_folder(folder: Path, layout: Layout) -> None:
    build_folder(folder)
    (folder / "video_preprocessor_config.json").unlink()
    for name, content in layout.files.items():
        (folder / name).write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = layout.family
    config["vision_config"] |= (
        {"patch_size": 14, "tokens_per_second": 2}
        if layout.family == "qwen2_5_vl"
        else {"patch_size": 16}
    )
    (folder / "config.json").write_text(json.dumps(config))


def bare(encoder: PromptEncoder, kinds: list[MediaKind]) -> str:
    """Return the rendered prompt.

    transformers 5.23 keeps the marks that a chat template has around a video besides those of its
    temporal patches. Version 4 and vLLM replace them, as here; with a bare placeholder 5.23 does
    the same.
    """
    return with_bare_videos(encoder, encoder.chat.render(ASKED, kinds).text)


def with_bare_videos(encoder: PromptEncoder, text: str) -> str:
    if encoder.chat.video_layout.timestamped:
        return text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    return text


@pytest.fixture(scope="module")
def answers(asked: list[Asked]) -> list[Processed]:
    return ask_transformers([each.case for each in asked])


def test_prompts_equal_those_of_transformers(asked: list[Asked], answers: list[Processed]) -> None:
    refused = set()
    for each, oracle in zip(asked, answers, strict=True):
        where = f"{each.layout}: {each.name}"
        if oracle.refusal:
            refused.add(each.name)
            continue
        prompt, vision = each.encoder.encode(each.text, each.question)
        assert prompt.token_ids.tolist() == oracle.values["input_ids"][0].tolist(), where
        seconds = []
        for kind, grids, pixels in (
            ("image", "image_grid_thw", "pixel_values"),
            ("video", "video_grid_thw", "pixel_values_videos"),
        ):
            mine = [item for item in vision if item.kind == kind]
            if not mine:
                assert grids not in oracle.values, where
                continue
            assert [list(item.grid) for item in mine] == oracle.values[grids].tolist(), where
            patches = np.concatenate([item.patches for item in mine])
            assert each.encoder.processor is not None
            step = 1 / 255 / min(each.encoder.processor.image_std)
            tolerance = FLOAT_TOLERANCE + (0 if oracle.is_exact else TORCHVISION_BYTES * step)
            difference = np.abs(patches - oracle.values[pixels]).max()
            assert difference <= tolerance, (where, difference / step)
            seconds += [item.seconds_per_patch for item in mine if kind == "video"]
        if "second_per_grid_ts" in oracle.values:
            assert seconds == oracle.values["second_per_grid_ts"].tolist(), where
    # Both are less than a temporal patch or more than a tower takes.
    assert refused == {"1 frames", "too narrow"}

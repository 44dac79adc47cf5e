"""Digit shards: the same bytes from the same seed, disjoint images, media that show the digits."""

from __future__ import annotations

import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data.errors import DataError
from data.media.opening import MediaLimits, MediaOpener
from data.shards import ShardFolder
from data.toy.digits import MODALITIES, Modality
from data.toy.digits_media import (
    FRAME_PIXELS,
    FRAMES_PER_DIGIT,
    TILE_PIXELS,
    encode_mp4,
    load_bank,
    read_digits,
)
from data.toy.digits_shards import build_digit_shards
from zppo_mm.bundled.folder import SAMPLING

CODEC_TOLERANCE = 3.0
"""Mean difference of grey values that H.264 at this quality leaves; measured below 1."""


def write(folder: Path, modality: Modality, seed: int = 0, count: int = 12) -> Path:
    build_digit_shards(folder, modality, "train", count, seed)
    return folder


def test_digits_are_those_that_scikit_learn_loads() -> None:
    images, labels = read_digits()
    expected = load_digits()
    assert np.array_equal(images, expected.images)
    assert np.array_equal(labels, expected.target)


@pytest.mark.parametrize("modality", MODALITIES)
def test_digits_shards_are_deterministic(tmp_path: Path, modality: Modality) -> None:
    first, second = (write(tmp_path / name, modality, 5) / "shard-000000.tar" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert (
        first.read_bytes() != (write(tmp_path / "c", modality, 6) / "shard-000000.tar").read_bytes()
    )


@pytest.mark.parametrize("modality", MODALITIES)
def test_digits_shards_read_back(tmp_path: Path, modality: Modality) -> None:
    folder = ShardFolder(write(tmp_path, modality))
    keys = folder.keys()
    questions = [folder.question(*key) for key in keys]
    assert len({question.id for question in questions}) == len(questions) == 12
    for question in questions:
        assert [reference.kind for reference in question.media] == (
            [] if modality == "text" else [modality]
        )
        assert question.source == f"digits-{modality}"
        assert len(question.choices) == (4 if question.answer_type == "choice" else 0)


def test_digits_splits_share_no_image() -> None:
    train, held_out = (load_bank(split).glyphs for split in ("train", "held_out"))  # type: ignore[arg-type]
    for mine, others in zip(train, held_out, strict=True):
        assert len(mine) > len(others) > 0
        assert not {glyph.tobytes() for glyph in mine} & {glyph.tobytes() for glyph in others}


def test_digits_image_is_one_tile_per_digit(tmp_path: Path) -> None:
    folder = ShardFolder(write(tmp_path, "image"))
    keys = folder.keys()
    for key in keys:
        question = folder.question(*key)
        with Image.open(io.BytesIO(folder.media_bytes(question.media[0]))) as image:
            assert image.size == (TILE_PIXELS * _level(question.id), TILE_PIXELS)


def test_digits_video_shows_every_digit_for_its_second() -> None:
    rng = np.random.default_rng(0)
    bank = load_bank("train")
    tiles = [bank.tile(rng, digit, FRAME_PIXELS) for digit in (3, 1, 4)]
    content = encode_mp4(tiles)
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(tiles) * FRAMES_PER_DIGIT
    for index, frame in enumerate(frames):
        difference = np.abs(frame[:, :, 0].astype(int) - tiles[index // FRAMES_PER_DIGIT]).mean()
        assert difference < CODEC_TOLERANCE


def test_digits_video_samples_two_frames_per_digit(tmp_path: Path) -> None:
    folder = ShardFolder(write(tmp_path, "video", count=3))
    keys = folder.keys()
    opener = MediaOpener(MediaLimits(sampling=SAMPLING))
    try:
        for key in keys:
            question = folder.question(*key)
            frames = opener.open_ref(question.media[0], folder.reader)
            level = _level(question.id)
            assert frames.pixels.shape == (2 * level, FRAME_PIXELS, FRAME_PIXELS, 3)
            assert frames.timestamps == tuple(0.5 * index for index in range(2 * level))
            pairs = frames.pixels.astype(int).reshape(level, 2, -1)
            assert np.abs(pairs[:, 0] - pairs[:, 1]).mean() < CODEC_TOLERANCE
    finally:
        opener.close()


def test_digits_need_a_question(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few questions, got 0"):
        build_digit_shards(tmp_path, "text", "train", 0, 0)


def _level(question_id: str) -> int:
    found = re.search(r"-(\d)$", question_id)
    assert found is not None
    return int(found[1])

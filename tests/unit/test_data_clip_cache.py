"""Videos whose frames a disk keeps: the same frames and patches, and each clip decoded once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data.errors import MediaError
from data.media import clip_cache
from data.media.clip_cache import ClipCache
from data.media.disk_cache import ENDING
from data.media.opening import MediaLimits
from data.media.sampling import FrameSampling
from data.media.store import MediaStore
from data.question import MediaRef, Question
from data.sample import ShardSample
from data.shard_writer import write_shards
from encoders.config import ProcessorConfig
from encoders.processor import process_video, resize_video
from tests.unit.test_data_video import encode
from zppo_mm.config.schema import DataConfig
from zppo_mm.errors import ConfigError
from zppo_mm.rollout.opened_media import OpenedMedia, PromptError
from zppo_mm.run.shared import open_clip_cache

LIMITS = MediaLimits(sampling=FrameSampling(frames_per_second=5.0, max_frames=7))
PROCESSOR = ProcessorConfig(
    patch_size=8,
    temporal_patch_size=2,
    merge_size=2,
    image_min_pixels=256,
    image_max_pixels=4096,
    video_min_pixels=1024,
    video_max_pixels=8192,
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.6, 0.7),
)


def clip(seed: int) -> bytes:
    """Return 20 frames of noise, at 10 a second, which a resize changes."""
    random = np.random.default_rng(seed)
    return encode([random.integers(0, 256, (48, 80, 3), dtype=np.uint8) for _ in range(20)])


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Samples k0 to k4: two clips, the first again under another name, a broken one, a thin one."""
    thin = encode([np.zeros((2, 600, 3), np.uint8)] * 4)
    contents = [clip(0), clip(1), clip(0), clip(1)[:-100], thin]
    fields = {"id": "q", "question": "?", "answer": "1", "answer_type": "math"}
    samples = [
        ShardSample(f"k{index}", {**fields, "id": f"q{index}"}, [("mp4", content)])
        for index, content in enumerate(contents)
    ]
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, samples)
    return str(next(folder.glob("*.tar")))


@pytest.fixture(scope="module")
def store() -> Iterator[MediaStore]:
    made = MediaStore(LIMITS)
    yield made
    made.close()


def reference(shard: str, index: int) -> MediaRef:
    return MediaRef("video", shard, f"k{index}", "mp4")


def question(shard: str, index: int) -> Question:
    return Question(f"q{index}", "?", (reference(shard, index),), "1", "math")


def media(store: MediaStore, clips: ClipCache | None, processor: ProcessorConfig) -> OpenedMedia:
    return OpenedMedia(store.open, processor, clips=clips)


def test_patches_and_times_are_those_of_a_clip_that_is_decoded(
    store: MediaStore, shard: str, tmp_path: Path
) -> None:
    frames = store.open(reference(shard, 0))
    assert resize_video(frames.pixels, PROCESSOR).shape != frames.pixels.shape
    expected = process_video(frames.pixels, frames.timestamps, PROCESSOR, frames.seconds_per_frame)
    caches = [None, *(ClipCache(store, tmp_path, 1 << 30) for _ in range(2))]
    for clips in caches:
        [got] = media(store, clips, PROCESSOR).of(question(shard, 0))
        assert got.patches.dtype == expected.patches.dtype
        assert np.array_equal(got.patches, expected.patches)
        assert replace(got, patches=expected.patches) == expected
    assert [dict(each.counts) for each in caches if each] == [{"misses": 1}, {"hits": 1}]


def test_a_clip_goes_by_its_content_and_by_how_it_is_shown(
    store: MediaStore, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = ClipCache(store, tmp_path, 1 << 30)
    opened = media(store, clips, PROCESSOR)
    for index in (0, 1, 2):
        opened.of(question(shard, index))
    # The third has the name of another sample and the content of the first.
    assert clips.counts == {"misses": 2, "hits": 1}
    smaller = replace(PROCESSOR, video_max_pixels=4096)
    [got] = media(store, clips, smaller).of(question(shard, 0))
    [expected] = media(store, None, smaller).of(question(shard, 0))
    assert np.array_equal(got.patches, expected.patches)
    fewer = MediaStore(replace(LIMITS, sampling=FrameSampling(max_frames=4)))
    try:
        others = ClipCache(fewer, tmp_path, 1 << 30)
        [got] = media(fewer, others, PROCESSOR).of(question(shard, 0))
        assert len(got.timestamps) == 2
        assert others.counts == {"misses": 1}
    finally:
        fewer.close()
    monkeypatch.setattr(clip_cache, "DECODERS", ("decord2", "no such package"))
    updated = ClipCache(store, tmp_path, 1 << 30)
    media(store, updated, PROCESSOR).of(question(shard, 0))
    assert updated.counts == {"misses": 1}


def test_a_smaller_limit_refuses_a_clip_that_is_kept(
    store: MediaStore, shard: str, tmp_path: Path
) -> None:
    media(store, ClipCache(store, tmp_path, 1 << 30), PROCESSOR).of(question(shard, 0))
    small = MediaStore(replace(LIMITS, max_pixels=1000))
    try:
        with pytest.raises(PromptError, match=r"k0\.mp4: video: .*80x48"):
            media(small, ClipCache(small, tmp_path, 1 << 30), PROCESSOR).of(question(shard, 0))
    finally:
        small.close()


def test_refusals_are_the_same_and_not_kept(store: MediaStore, shard: str, tmp_path: Path) -> None:
    clips = ClipCache(store, tmp_path, 1 << 30)
    for index, reason in ((3, "truncated"), (4, "unusable_media")):
        said = []
        for each in (None, clips, clips):
            with pytest.raises(PromptError) as caught:
                media(store, each, PROCESSOR).of(question(shard, index))
            said.append((caught.value.reason, str(caught.value)))
        assert said[0][0] == reason
        assert said == [said[0]] * 3
    with pytest.raises(MediaError) as missing:
        clips.open(replace(reference(shard, 0), extension="avi"), "", lambda pixels: pixels)
    assert missing.value.reason == "missing"
    assert not list(tmp_path.glob(f"*{ENDING}*"))


def test_a_truncated_file_is_decoded_again(store: MediaStore, shard: str, tmp_path: Path) -> None:
    clips = ClipCache(store, tmp_path, 1 << 30)
    resize = partial(resize_video, config=PROCESSOR)
    first = clips.open(reference(shard, 0), "", resize)
    [path] = tmp_path.glob(f"*{ENDING}")
    os.truncate(path, path.stat().st_size // 2)
    again = clips.open(reference(shard, 0), "", resize)
    assert np.array_equal(first.pixels, again.pixels)
    assert (first.timestamps, first.seconds_per_frame) == (
        again.timestamps,
        again.seconds_per_frame,
    )
    assert clips.counts == {"misses": 2, "damaged": 1}
    assert clips.num_bytes() >= path.stat().st_size


def test_the_configuration_names_folder_and_limit(store: MediaStore, tmp_path: Path) -> None:
    assert open_clip_cache(DataConfig(), store) is None
    folder = tmp_path / "new" / "frames"
    clips = open_clip_cache(DataConfig(video_cache_dir=str(folder), video_cache_gib=1.5), store)
    assert clips is not None
    assert clips.max_bytes == 3 << 29
    assert folder.is_dir()
    (tmp_path / "file").write_text("")
    bad = DataConfig(video_cache_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"data\.video_cache_dir: the folder cannot be used, got"):
        open_clip_cache(bad, store)

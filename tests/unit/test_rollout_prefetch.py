"""Media opened ahead: nothing about a run depends on it but when a medium is opened."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError, MediaError
from data.health import SampleHealth
from data.media.node_cache import NodeCache
from data.media.opening import Frames
from data.question import MediaRef, Question
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.tiny_folder import build_folder
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.prefetch import MediaPrefetch
from zppo_mm.rollout.prompt import PromptEncoder

NUM_QUESTIONS = 20


class Media:
    """Invented media; remembers who opened which, by thread."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, bool]] = []

    def __call__(self, reference: MediaRef) -> Frames:
        is_ahead = threading.current_thread() is not threading.main_thread()
        self.opened.append((reference.key, is_ahead))
        if reference.key.endswith("7"):
            raise MediaError("unreadable", "cannot decode")
        pixels = np.full((1, 16, 16, 3), int(reference.key[1:]), np.uint8)
        return Frames(pixels, (0.0,))

    def keys(self, is_ahead: bool) -> set[str]:
        return {key for key, ahead in self.opened if ahead == is_ahead}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_folder(path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with an image each; 7 and 17 have broken ones, 3 a very long text."""
    path = tmp_path_factory.mktemp("shards")
    samples = []
    for index in range(NUM_QUESTIONS):
        text = "long " * 100 if index == 3 else f"question {index}"
        fields = {"id": f"q{index}", "question": text, "answer": "1", "answer_type": "math"}
        samples.append(ShardSample(f"k{index}", fields, [("png", b"x")]))
    write_shards(path, samples)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[NodeCache]:
    made = NodeCache("run", 1 << 30, tmp_path)
    yield made
    made.close()


def feed_of(
    shards: Path, encoder: PromptEncoder, prefetch: MediaPrefetch | None = None
) -> QuestionFeed:
    health = SampleHealth(max_bad_fraction=0.5)
    return QuestionFeed(
        QuestionStream([(ShardFolder(shards), 1.0)], 5, health),
        encoder,
        health,
        SingleProcess(),
        plain_text=lambda question: question.text,
        max_prompt_tokens=120,
        can_grade=lambda question: question.id != "q4",
        prefetch=prefetch,
    )


def take(feed: QuestionFeed, count: int) -> Any:
    """Return questions, and what a checkpoint would hold then."""
    questions = feed.take(count)
    patches = [feed.encoder.vision_inputs(question)[0].patches.tobytes() for question in questions]
    return questions, patches, json.dumps(feed.stream.state_dict())


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_questions_states_and_patches_do_not_depend_on_it(
    folder: Path, shards: Path, cache: NodeCache, num_threads: int, waits: bool
) -> None:
    plain = feed_of(shards, PromptEncoder(folder, Media()))
    media = Media()
    encoder = PromptEncoder(folder, media, cache=cache)
    prefetch = MediaPrefetch(encoder.media.prefetch, num_threads)
    feed = feed_of(shards, encoder, prefetch)
    for count in (3, 3, 5, 5, 5, 5):
        assert take(feed, count) == take(plain, count)
        if waits:
            prefetch.wait()
        encoder.forget_media()
        cache.next_step()
    prefetch.close()
    good = [key for key, _ in media.opened if not key.endswith("7")]
    assert len(good) == len(set(good)), "each was opened once"
    assert "k4" not in good, "nobody can grade it"
    if waits:
        assert cache.counts["prefetched"] >= 3
        assert media.keys(is_ahead=True) - media.keys(is_ahead=False)


def test_the_next_questions_are_open_before_they_are_drawn(
    folder: Path, shards: Path, cache: NodeCache
) -> None:
    media = Media()
    encoder = PromptEncoder(folder, media, cache=cache)
    prefetch = MediaPrefetch(encoder.media.prefetch, 2)
    feed = feed_of(shards, encoder, prefetch)
    feed.take(4)
    prefetch.wait()
    drawn = {question.media[0].key for question in feed.stream.look_ahead()(4)}
    assert media.keys(is_ahead=True) == drawn - {"k4"}
    media.opened.clear()
    feed.take(4)
    in_main = media.keys(is_ahead=False)
    assert not in_main & drawn - {"k7", "k17"}
    prefetch.close()


def test_models_that_process_media_differently_share_none(folder: Path, cache: NodeCache) -> None:
    larger = {"image_min_pixels": 4096}
    for overrides, grid in (({}, (1, 4, 4)), (larger, (1, 16, 16)), ({}, (1, 4, 4))):
        encoder = PromptEncoder(folder, Media(), overrides=overrides, cache=cache)
        assert encoder.vision_inputs(question("k1"))[0].grid == grid
    assert cache.counts == {"opened": 2, "found": 1}


def question(name: str) -> Question:
    return Question(name, "", (MediaRef("image", "s.tar", name, "png"),), "1", "math")


def test_a_failure_ends_nothing_and_no_room_ends_all(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    def open_ahead(each: Question) -> bool:
        asked.append(each.id)
        if each.id == "bad":
            raise MediaError("unreadable", "cannot decode")
        if each.id == "lost":
            raise DataError("the shard is gone")
        return each.id != "big"

    text = Question("text", "", (), "1", "math")
    prefetch = MediaPrefetch(open_ahead, 1)
    prefetch.wait()
    names = ("bad", "lost", "good", "big", "after")
    prefetch.start(lambda: [text, *map(question, names)])
    prefetch.wait()
    assert asked == ["bad", "lost", "good", "big"]

    def fail() -> list[Question]:
        raise DataError("no good sample in a whole epoch")

    prefetch.start(fail)
    prefetch.wait()
    assert not caplog.records
    # A programming error is logged, and does not end the threads.
    prefetch.start(lambda: [question("good")] * (1 // 0))
    with pytest.raises(ZeroDivisionError):
        prefetch.wait()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    prefetch.start(lambda: [question("later")])
    prefetch.wait()
    assert asked[-1] == "later"
    prefetch.close()


def test_new_questions_and_the_end_leave_the_earlier_ones() -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    asked: list[str] = []

    def open_ahead(each: Question) -> bool:
        asked.append(each.id)
        begun.set()
        may_go_on.wait()
        return True

    prefetch = MediaPrefetch(open_ahead, 1)
    prefetch.start(lambda: map(question, ("a", "b", "c")))
    begun.wait()
    prefetch.start(lambda: map(question, ("d", "e")))
    may_go_on.set()
    prefetch.wait()
    assert asked == ["a", "d", "e"]
    begun.clear()
    may_go_on.clear()
    prefetch.start(lambda: map(question, ("f", "g")))
    begun.wait()
    closing = threading.Thread(target=prefetch.close)
    closing.start()
    while not prefetch._pool._shutdown:
        pass
    may_go_on.set()
    closing.join()
    assert asked == ["a", "d", "e", "f"]

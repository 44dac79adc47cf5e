"""Images and videos on their way to a served teacher: the pixels that leave, and a real model that
sees them arrive.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.media.opening import Frames, MediaLimits, MediaOpener
from data.question import MediaRef, Question
from data.shard_writer import write_shards
from data.shards import ShardFolder, ShardReader
from data.toy.digits_shards import digit_samples
from tests.support.loopback_server import LoopbackServer, TinyModel, serve
from tests.support.pool_asking import served_teacher
from zppo_mm.bundled import TEACHER_DIR
from zppo_mm.bundled.folder import SAMPLING
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.experience import Rollout
from zppo_mm.rewards.verify import Verifier
from zppo_mm.teacher.served.media import MessageWriter
from zppo_mm.teacher.served.pool import EndpointPool

NUM_QUESTIONS = 6


class Shards:
    """Opens media of shards as a run does."""

    def __init__(self, folder: Path) -> None:
        self.reader, self.opener = ShardReader(), MediaOpener(MediaLimits(sampling=SAMPLING))
        shards = ShardFolder(folder)
        self.questions = [shards.question(*key) for key in shards.keys()]  # noqa: SIM118 (no mapping)

    def open(self, ref: MediaRef) -> Frames:
        return self.opener.open_ref(ref, self.reader)

    def read(self, ref: MediaRef) -> bytes:
        return self.opener.read_ref(ref, self.reader)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return shards_of(tmp_path_factory.mktemp("image"), "image")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    made = shards_of(tmp_path_factory.mktemp("video"), "video")
    yield made
    made.opener.close()


def shards_of(folder: Path, modality: Any) -> Shards:
    write_shards(folder, digit_samples(modality, "train", NUM_QUESTIONS, 3))
    return Shards(folder)


def parts_of(shards: Shards, question: Question, **options: Any) -> Sequence[Any]:
    (message,) = MessageWriter(TeacherConfig(**options), shards).messages(
        "Look. <|image_pad|>", question.media
    )
    content: list[Any] = message["content"]
    assert content[-1] == {"type": "text", "text": "Look. < |image_pad|>"}
    return content[:-1]


def pixels_of(part: Any, kind: str) -> Any:
    header, _, encoded = part["image_url"]["url"].partition(",")
    assert header == f"data:image/{kind};base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_an_image_leaves_as_the_pixels_that_the_student_sees(image: Shards) -> None:
    question = image.questions[0]
    (part,) = parts_of(image, question)
    assert np.array_equal(pixels_of(part, "png"), image.open(question.media[0]).pixels[0])
    (part,) = parts_of(image, question, media_format="jpeg")
    difference = pixels_of(part, "jpeg").astype(int) - image.open(question.media[0]).pixels[0]
    assert 0 < np.abs(difference).mean() < 8  # lossy, yet the same picture


def test_a_video_leaves_as_its_sampled_frames_or_as_its_file(video: Shards) -> None:
    question = video.questions[0]
    frames = video.open(question.media[0])
    head, *images = parts_of(video, question)
    assert head["text"].startswith(f"A video as {len(frames.pixels)} frames, at 0.00, 0.50, ")
    assert all(
        np.array_equal(pixels_of(part, "png"), pixels)
        for part, pixels in zip(images, frames.pixels, strict=True)
    )
    (part,) = parts_of(video, question, video="file")
    header, _, encoded = part["video_url"]["url"].partition(",")
    assert header == "data:video/mp4;base64"
    assert base64.b64decode(encoded) == video.read(question.media[0])


def test_a_text_question_is_one_text() -> None:
    messages = MessageWriter(TeacherConfig()).messages("Hi")
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackServer]:
    with serve(TinyModel(TEACHER_DIR)) as made:
        yield made


def ask(
    server: LoopbackServer, shards: Shards, questions: Sequence[Question], **options: Any
) -> tuple[Mapping[str, tuple[Rollout, ...]], Counter[str]]:
    """Return one greedy answer per question, and the counts."""
    config = TeacherConfig(
        model="tiny",
        temperature=0.0,
        num_rollouts=1,
        max_response_tokens=64,
        max_concurrency=2,
        **options,
    )
    pool = EndpointPool([server.url], "tiny", config, media=shards)
    with Verifier() as verifier:
        teacher = served_teacher(pool, config, verifier, server.model.encoder)
        answers = teacher.submit(questions, 1).wait()
    pool.close()
    assert list(answers) == [question.id for question in questions]
    return answers, pool.counts


def num_right(answers: Mapping[str, tuple[Rollout, ...]]) -> float:
    return sum(rollout.reward for rollouts in answers.values() for rollout in rollouts)


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.medium
def test_a_served_model_reads_the_digits_that_were_sent(
    server: LoopbackServer, modality: str, request: pytest.FixtureRequest
) -> None:
    """The bundled teacher solves four in five with the media, and about one in ten by guessing."""
    shards: Shards = request.getfixturevalue(modality)
    answers, counts = ask(server, shards, shards.questions, video="file")
    assert num_right(answers) >= NUM_QUESTIONS / 2
    assert counts["prompt_tokens"] > 20 * NUM_QUESTIONS
    others = [
        replace(q, media=other.media)
        for q, other in zip(shards.questions, reversed(shards.questions), strict=True)
    ]
    assert num_right(ask(server, shards, others, video="file")[0]) < num_right(answers)


def test_a_question_whose_media_are_gone_is_passed_over(
    server: LoopbackServer, image: Shards
) -> None:
    there = image.questions[0]
    lost = replace(there, id="lost", media=(replace(there.media[0], extension="gone"),))
    answers, _ = ask(
        server, image, [lost, there], on_failure="stop"
    )  # no fault of the server: the run does not stop
    assert [len(rollouts) for rollouts in answers.values()] == [0, 1]

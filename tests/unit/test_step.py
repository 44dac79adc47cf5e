"""What a step refuses before it samples anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.health import SampleHealth
from data.media.opening import Frames
from data.question import MediaRef
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.shard_samples import sample
from tests.support.tiny_folder import build_folder
from zppo_mm.config.load import load_config
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.step import Stages, run_step
from zppo_mm.zone.plain_schedule import PlainSchedule
from zppo_mm.zone.replay import ReplayBuffer


def no_media(reference: MediaRef) -> Frames:
    raise AssertionError(reference)


def test_two_questions_with_one_id_stop_the_step(tmp_path: Path) -> None:
    write_shards(tmp_path / "first", [sample(1, source="first")])
    write_shards(tmp_path / "second", [sample(1, source="second", question="Another one?")])
    build_folder(tmp_path)
    health = SampleHealth()
    stream = QuestionStream(
        [(ShardFolder(tmp_path / name), 1.0) for name in ("first", "second")], 0, health
    )
    encoder = PromptEncoder(tmp_path, no_media)
    feed = QuestionFeed(
        stream,
        encoder,
        health,
        SingleProcess(),
        plain_text=lambda question: question.text,
        max_prompt_tokens=100,
    )
    unused: Any = None
    stages = Stages(
        config=load_config(None),
        feed=feed,
        replay=ReplayBuffer(4),
        sampler=unused,
        sampling=unused,
        teacher=None,
        reformulator=unused,
        selection=unused,
        learner=unused,
        schedule=PlainSchedule(seed=0),
    )
    named = (
        r"two different questions have the id 'q1', got '1 \+ 1 = \?' \(source 'first'\) and "
        r"'Another one\?' \(source 'second'\)"
    )
    with pytest.raises(DataError, match=named):
        run_step(stages, 1)

"""Held-out questions: always the same ones, bad ones left out and counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.health import SampleHealth
from data.media.opening import Frames
from data.question import MediaRef, Question
from data.shard_writer import write_shards
from data.shards import ShardFolder
from tests.support.shard_samples import sample
from tests.support.tiny_folder import build_folder
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.held_out import ask_held_out, held_out_questions, summarise
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler

SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=4, stop_token_ids=(0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """Thirty samples; 4 has no answer, 9 is open."""
    path = tmp_path_factory.mktemp("held_out")
    changed: dict[int, dict[str, object]] = {4: {"answer": ""}, 9: {"answer_type": "open"}}
    write_shards(path, [sample(index, **changed.get(index, {})) for index in range(30)])
    return ShardFolder(path)


def test_bad_and_ungradable_questions_are_left_out_named_and_counted(
    folder: ShardFolder, caplog: pytest.LogCaptureFixture
) -> None:
    health = SampleHealth(max_bad_fraction=0.1)
    with Verifier() as verifier:
        held_out = held_out_questions([folder], 0, 0, health, verifier.can_grade)
    assert [question.id for question in held_out.questions] == [
        f"q{index}" for index in range(30) if index not in (4, 9)
    ]
    assert held_out.num_skipped == 2
    assert (health.counts, health.left_out) == ({"bad_field": 1}, {"needs_judge": 1})
    assert "shard-000000.tar:000004: bad_field" in caplog.text
    assert "shard-000000.tar:000009: needs_judge" in caplog.text


def test_a_subset_is_the_same_for_the_same_seed_and_none_replaces_a_bad_one(
    folder: ShardFolder,
) -> None:
    first, again = (held_out_questions([folder, folder], 25, 3) for _ in range(2))
    assert first == again
    assert len(first) + first.num_skipped == 25
    assert first != held_out_questions([folder, folder], 25, 4)


def test_too_many_bad_ones_stop_the_run(folder: ShardFolder, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)too many bad samples, got 1 of 20 .*000004: bad_field"
    ):
        held_out_questions([folder], 0, 0, SampleHealth(max_bad_fraction=0.01))
    write_shards(tmp_path, [sample(0, answer="")])
    with pytest.raises(
        DataError,
        match=r"held-out data: no question can be asked, got 1 that cannot \({'bad_field': 1}\)",
    ):
        held_out_questions([ShardFolder(tmp_path)], 0, 0, SampleHealth(max_bad_fraction=1.0))


class SilentEngine:
    """Ends every response at once."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        return [
            [Generation(np.array([0]), np.zeros(1, np.float32), "stop")] * request.num_rollouts
            for request in requests
        ]


def test_what_was_left_out_is_in_the_evaluation(folder: ShardFolder, tmp_path: Path) -> None:
    def no_media(reference: MediaRef) -> Frames:
        raise AssertionError(reference)

    def plain_text(question: Question) -> str:
        return question.text

    build_folder(tmp_path)
    with Verifier() as verifier:
        held_out = held_out_questions([folder], 0, 0, SampleHealth(0.1), verifier.can_grade)
        sampler = GroupSampler(
            SilentEngine(), PromptEncoder(tmp_path, no_media), verifier, SingleProcess()
        )
        groups = ask_held_out(sampler, held_out, plain_text, SAMPLING, 2, step=5)
    lengths = sorted(len(group.prompt.token_ids) for group in groups)
    result = summarise(groups, held_out, step=5, max_prompt_tokens=lengths[-1] - 1)
    assert (result.step, result.num_questions, result.num_skipped, result.accuracy) == (
        5,
        28,
        2,
        0.0,
    )
    # Asked all the same.
    assert result.num_too_long == lengths.count(lengths[-1]) > 0

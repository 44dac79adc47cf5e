"""The question feed and the group sampler in one process: what is taken, graded, refused and
counted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError, MediaError
from data.health import SampleHealth
from data.media.opening import Frames
from data.question import MediaRef, Question
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.tiny_folder import build_folder
from zppo_mm.experience import PromptInstance
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.replica_shares import split_instances
from zppo_mm.rollout.sampler import GroupSampler

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=(0,))


def open_media(reference: MediaRef) -> Frames:
    if reference.key.endswith("7"):
        raise MediaError("unreadable", "cannot decode")
    return Frames(np.zeros((1, 16, 16, 3), np.uint8), (0.0,))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("model")
    build_folder(folder)
    return PromptEncoder(folder, open_media)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty questions; 7 and 17 have broken media, 3 a very long text."""
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for index in range(20):
        text = "long " * 100 if index == 3 else f"question {index}"
        fields = {
            "id": f"q{index}",
            "question": text,
            "answer": "1",
            "answer_type": "math",
            "source": "s",
        }
        samples.append(ShardSample(f"k{index}", fields, [("png", b"x")] if index % 2 else []))
    write_shards(folder, samples)
    return folder


def feed_of(
    shards: Path,
    encoder: PromptEncoder,
    can_grade: Callable[[Question], bool] = lambda question: True,
    **limits: Any,
) -> tuple[QuestionFeed, SampleHealth]:
    health = SampleHealth(**limits)
    feed = QuestionFeed(
        QuestionStream([(ShardFolder(shards), 1.0)], 5, health),
        encoder,
        health,
        SingleProcess(),
        plain_text=lambda question: question.text,
        max_prompt_tokens=120,
        can_grade=can_grade,
    )
    return feed, health


def test_feed_takes_good_questions_only_and_counts_the_others(
    shards: Path, encoder: PromptEncoder
) -> None:
    feed, health = feed_of(shards, encoder, max_bad_fraction=0.5)
    taken = [question.id for question in feed.take(17)]
    assert sorted(taken) == sorted({f"q{index}" for index in range(20)} - {"q3", "q7", "q17"})
    feed, health = feed_of(shards, encoder, max_bad_fraction=0.5)
    in_two_parts = [question.id for question in feed.take(5) + feed.take(29)]
    assert in_two_parts[:17] == taken
    assert health.num_good == 34
    assert set(health.counts) == {"unreadable"}
    assert health.num_bad > 0
    assert health.left_out["too_long"] > 0


def test_a_too_long_prompt_is_no_bad_sample(
    tmp_path: Path, encoder: PromptEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    write_questions(tmp_path, ["long " * 40 if index % 2 else "short" for index in range(60)])
    feed, health = feed_of(tmp_path, encoder, strict=True)
    with caplog.at_level(logging.WARNING):
        taken = feed.take(30)
    assert {question.text for question in taken} == {"short"}
    assert (health.num_good, health.num_bad) == (30, 0)
    assert health.left_out["too_long"] > 10, "ten times what data.max_bad_fraction allows"
    [message] = [record.getMessage() for record in caplog.records]
    assert "tokens, more than data.max_prompt_tokens=120" in message
    kept = SampleHealth()
    kept.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert kept.left_out == health.left_out


def test_an_epoch_without_a_short_enough_prompt_ends_the_run(
    tmp_path: Path, encoder: PromptEncoder
) -> None:
    write_questions(tmp_path, ["long " * 40] * 5)
    with pytest.raises(DataError, match=r"no question of a whole epoch .* the last as too_long"):
        feed_of(tmp_path, encoder)[0].take(1)


def write_questions(folder: Path, texts: list[str]) -> None:
    fields = {"answer": "1", "answer_type": "math", "source": "s"}
    write_shards(
        folder,
        [
            ShardSample(f"k{index}", {"id": f"q{index}", "question": text, **fields}, [])
            for index, text in enumerate(texts)
        ],
    )


def test_feed_stops_at_too_many_bad_samples_or_the_first_when_strict(
    shards: Path, encoder: PromptEncoder
) -> None:
    with pytest.raises(DataError, match="too many bad samples"):
        feed_of(shards, encoder, max_bad_fraction=0.05)[0].take(40)
    with pytest.raises(DataError, match="run without strict"):
        feed_of(shards, encoder, strict=True)[0].take(20)


def test_feed_refuses_what_cannot_be_graded(shards: Path, encoder: PromptEncoder) -> None:
    can_grade = lambda question: question.id not in ("q4", "q17")  # noqa: E731
    feed, health = feed_of(shards, encoder, can_grade, strict=True)
    assert not {question.id for question in feed.take(16)} & {"q3", "q4", "q7", "q17"}
    # The media of q17 are broken as well, but need not be opened.
    assert (health.counts, health.left_out["needs_judge"]) == ({}, 2)


@pytest.mark.timeout(60)
def test_feed_stops_when_a_whole_epoch_is_refused(shards: Path, encoder: PromptEncoder) -> None:
    def feed_without(refused: set[str]) -> QuestionFeed:
        accepts = lambda question: question.id not in refused  # noqa: E731
        return feed_of(shards, encoder, accepts, max_bad_fraction=1.0)[0]

    everything = {f"q{index}" for index in range(20)}
    with pytest.raises(
        DataError,
        match=(
            r"no question of a whole epoch can be asked, got 20 refused in a row, the last as \w+ "
            r"\("
        ),
    ):
        feed_without(everything).take(1)
    # One good question of twenty is never a whole epoch away.
    assert {question.id for question in feed_without(everything - {"q2"}).take(1)} == {"q2"}


class EchoEngine:
    """Continues every prompt by its own last tokens and the number of the rollout."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        self.requests.extend(requests)
        return [
            [
                Generation(
                    np.array([65 + rollout, 0]),
                    np.full(2, -0.5, np.float32),
                    "stop" if rollout else "length",
                )
                for rollout in range(request.num_rollouts)
            ]
            for request in requests
        ]


class FirstLetterGrader:
    """Right is the response that equals the answer."""

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        return [Verdict(text, float(text == question.answer), "match") for question, text in items]


def instance(
    index: int, kind: str = "new", media: str | None = None, text: str = "what?"
) -> PromptInstance:
    references = (MediaRef("image", "s.tar", media, "png"),) if media else ()
    answer = chr(ord("b") + index % 2)
    question = Question(
        id=f"q{index}", text="", media=references, answer=answer, answer_type="open"
    )
    return PromptInstance(f"1/{kind}/{index}", question, kind, text)


def test_sampler_returns_verified_groups_in_order(encoder: PromptEncoder) -> None:
    engine = EchoEngine()
    sampler = GroupSampler(engine, encoder, FirstLetterGrader(), SingleProcess())
    instances = [
        instance(0),
        instance(1, media="k7"),
        instance(2, media="k1"),
        instance(3, kind="bcq"),
    ]
    groups = sampler.sample(instances, SAMPLING, 3, step=4)
    assert [group.uid for group in groups] == ["1/new/0", "1/new/2", "1/bcq/3"]
    assert dict(sampler.failures) == {"unreadable": 1}
    # tokens 65, 66, 67 of the byte alphabet are b, c, d; question 0 wants b, question 3 wants c
    letters = [encoder.decode([token]) for token in (65, 66, 67)]
    assert [rollout.text for rollout in groups[0].rollouts] == [
        letter + encoder.decode([0]) for letter in letters
    ]
    assert [rollout.finish_reason for rollout in groups[0].rollouts] == ["length", "stop", "stop"]
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {4}
    assert [request.seed_path for request in engine.requests] == [
        ("rollout", uid) for uid in ("1/new/0", "1/new/2", "1/bcq/3")
    ]
    assert [len(request.vision) for request in engine.requests] == [0, 1, 0]
    assert len(groups[1].prompt.grids) == 1


def test_sampler_grades_with_the_questions_answer(encoder: PromptEncoder) -> None:
    class Plain(EchoEngine):
        def generate(
            self, requests: Sequence[GenerationRequest], sampling: SamplingParams
        ) -> list[list[Generation]]:
            tokens = encoder.chat.tokenize(["b"]), encoder.chat.tokenize(["c"])
            make = [Generation(np.array(ids), np.zeros(1, np.float32), "stop") for ids in tokens]
            return [make for _ in requests]

    groups = GroupSampler(Plain(), encoder, FirstLetterGrader(), SingleProcess()).sample(
        [instance(0), instance(1)], SAMPLING, 2, 1
    )
    assert [[rollout.reward for rollout in group.rollouts] for group in groups] == [
        [1.0, 0.0],
        [0.0, 1.0],
    ]
    assert [[rollout.parsed for rollout in group.rollouts] for group in groups] == [
        ["b", "c"],
        ["b", "c"],
    ]


def test_a_given_prefix_is_prompt_to_the_engine_and_response_to_the_grader(
    encoder: PromptEncoder,
) -> None:
    class Ends(EchoEngine):
        def generate(
            self, requests: Sequence[GenerationRequest], sampling: SamplingParams
        ) -> list[list[Generation]]:
            self.requests += list(requests)
            return [
                [
                    Generation(
                        np.array(encoder.chat.tokenize(["c"])), np.zeros(1, np.float32), "stop"
                    )
                ]
                for _ in requests
            ]

    engine, prefix = Ends(), tuple(encoder.chat.tokenize(["b"]))
    plain = instance(0)
    asked = replace(
        plain,
        uid="1/prefix/0",
        kind="prefix",
        question=replace(plain.question, answer="bc"),
        response_prefix=prefix,
    )
    groups = GroupSampler(engine, encoder, FirstLetterGrader(), SingleProcess()).sample(
        [plain, asked], SAMPLING, 1, 1
    )
    before, after = (request.prompt for request in engine.requests)
    assert after.token_ids.tolist() == [*before.token_ids.tolist(), *prefix]
    assert after.positions[:, -1].tolist() == [before.next_position] * 3
    assert after.next_position == before.next_position + 1
    (rollout,) = groups[1].rollouts
    assert (rollout.text, rollout.reward, len(rollout.response_ids)) == ("bc", 1.0, 1)
    assert groups[1].prompt == after


def test_adopted_rollouts_get_this_models_prompts_and_failures_are_counted(
    encoder: PromptEncoder,
) -> None:
    engine = EchoEngine()
    sampler = GroupSampler(engine, encoder, FirstLetterGrader(), SingleProcess())
    (sampled,) = sampler.sample([instance(0)], SAMPLING, 2, 1)
    adopted = sampler.adopt(
        [instance(0), instance(1, media="k7")], [sampled.rollouts, sampled.rollouts]
    )
    assert [group.uid for group in adopted] == ["1/new/0"]
    assert adopted[0].rollouts == sampled.rollouts
    assert adopted[0].prompt.token_ids.tolist() == sampled.prompt.token_ids.tolist()
    assert dict(sampler.failures) == {"unreadable": 1}
    assert len(engine.requests) == 1  # nothing was generated


class Narrow(EchoEngine):
    """Has no room for more than some tokens."""

    def __init__(self, max_prompt_tokens: int) -> None:
        super().__init__()
        self._max_prompt_tokens = max_prompt_tokens

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        fitting = [len(each.prompt.token_ids) <= self._max_prompt_tokens for each in requests]
        groups = super().generate(requests, sampling)
        return [group if fits else [] for group, fits in zip(groups, fitting, strict=True)]


def test_a_prompt_without_room_fails_alone_and_is_counted(
    encoder: PromptEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = GroupSampler(Narrow(200), encoder, FirstLetterGrader(), SingleProcess())
    instances = [instance(0), instance(1, kind="bcq", text="long " * 50), instance(2)]
    groups = sampler.sample(instances, SAMPLING, 2, 1)
    assert [group.uid for group in groups] == ["1/new/0", "1/new/2"]
    assert sampler.failed == {"1/bcq/1": "no_room"}
    assert "left out 1/bcq/1: no_room: the prompt does not fit the decoding cache" in caplog.text
    first, none, last = sampler.respond(["a", "long " * 50, "b"], SAMPLING, "rewrite")
    assert first == last == encoder.decode_whole([65, 0])
    assert none is None
    assert sampler.failed == {"rewrite/1": "no_room"}
    assert dict(sampler.failures) == {"no_room": 2}
    # Refused prompts say nothing about the network, however many.
    assert sampler.respond(["long " * 50] * 30, SAMPLING, "rewrite") == [None] * 30


def test_sampler_calls_the_engine_even_for_nothing(encoder: PromptEncoder) -> None:
    called = []

    class Recorder(EchoEngine):
        def generate(
            self, requests: Sequence[GenerationRequest], sampling: SamplingParams
        ) -> list[list[Generation]]:
            called.append(len(requests))
            return super().generate(requests, sampling)

    assert (
        GroupSampler(Recorder(), encoder, FirstLetterGrader(), SingleProcess()).sample(
            [], SAMPLING, 2, 1
        )
        == []
    )
    assert called == [0]


@given(st.lists(st.sampled_from(["new", "replayed", "bcq", "ncq"]), max_size=30), st.integers(1, 5))
def test_split_covers_every_instance_once_and_evenly(kinds: list[str], num_replicas: int) -> None:
    instances = [
        instance(index, kind, text="x" * (index * 7 % 11)) for index, kind in enumerate(kinds)
    ]
    parts = split_instances(instances, num_replicas)
    assert sorted(index for part in parts for index in part) == list(range(len(instances)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == sorted(part) for part in parts)


def test_split_does_not_give_one_replica_all_the_long_prompts() -> None:
    pairs = [
        instance(index, kind, text="x" * length)
        for index in range(4)
        for kind, length in (("bcq", 10), ("ncq", 1000))
    ]
    totals = [sum(len(pairs[index].text) for index in part) for part in split_instances(pairs, 2)]
    assert totals == [2020, 2020]

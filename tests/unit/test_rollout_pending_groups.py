"""Groups that an engine samples meanwhile: what a checkpoint keeps of them, and that any layout
takes them up again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.question import MediaRef, Question
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.shard_samples import sample
from tests.support.tiny_folder import build_folder
from zppo_mm.experience import PromptInstance
from zppo_mm.interruption import Interruption, StopRequested
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams, VersionSpan
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.rollout.saved_generations import from_bytes, to_bytes
from zppo_mm.stages.overlap import Ahead, Overlap

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=(0,))
OVERHEAD_BYTES = 4000  # of an archive with few prompts


def plain(generation: Generation) -> tuple[Any, ...]:
    """Return a continuation as something that can be compared."""
    ids, logprobs = generation.response_ids, generation.rollout_logprobs
    assert (ids.dtype, logprobs.dtype) == (np.int64, np.float32)
    rest = (generation.finish_reason, generation.is_broken, generation.num_preemptions)
    return ids.tolist(), logprobs.tobytes(), rest, generation.versions


@st.composite
def generations(draw: st.DrawFn) -> Generation:
    spans = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), max_size=3))
    length = sum(num_tokens for _, num_tokens in spans) if spans else draw(st.integers(0, 5))
    logprob = st.floats(width=32, allow_nan=True)
    return Generation(
        np.array(
            draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)), np.int64
        ),
        np.array(draw(st.lists(logprob, min_size=length, max_size=length)), np.float32),
        draw(st.sampled_from(["stop", "length"])),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
        tuple(VersionSpan(*span) for span in spans),
    )


@given(st.dictionaries(st.text(max_size=4), st.lists(generations(), max_size=3), max_size=4))
def test_what_is_saved_is_read_to_the_bit(groups: dict[str, list[Generation]]) -> None:
    read = from_bytes(to_bytes(groups))
    assert list(read) == list(groups)
    for uid, group in groups.items():
        assert [plain(each) for each in read[uid]] == [plain(each) for each in group]


def test_a_token_takes_8_bytes() -> None:
    num_tokens = 100_000
    one = Generation(np.arange(num_tokens), np.zeros(num_tokens, np.float32), "length")
    assert 8 * num_tokens < len(to_bytes({"uid": [one]})) < 8 * num_tokens + OVERHEAD_BYTES


@dataclass
class NamingEngine:
    """An engine elsewhere: every response is a number of its own. Remembers what it was asked."""

    first: int
    asked: list[str] = field(default_factory=list)
    is_stopping: bool = False
    num_cancelled: int = 0

    def start(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> NamedResponses:
        begin = self.first + len(self.asked)
        self.asked += [str(request.seed_path[1]) for request in requests]
        return NamedResponses(self, range(begin, begin + len(requests)))

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        return self.start(requests, sampling).wait()

    def update_weights(self, version: int) -> None:
        raise AssertionError(version)

    def close(self) -> None:
        raise AssertionError


@dataclass
class NamedResponses:
    engine: NamingEngine
    numbers: range

    def wait(self) -> list[list[Generation]]:
        if self.engine.is_stopping:
            raise StopRequested
        one = np.full(1, -0.5, np.float32)
        return [[Generation(np.array([number]), one, "stop")] for number in self.numbers]

    def cancel(self) -> None:
        self.engine.num_cancelled += 1


class NoGrader:
    """Finds everything right."""

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        return [Verdict(text, 1.0, "match") for _, text in items]


@dataclass
class OneOfTwo(SingleProcess):
    """One of two replicas; the other one says nothing."""

    replica: int
    num_replicas = 2

    def gather(self, local: Sequence[Any]) -> list[list[Any]]:
        return [list(local), []]


def no_media(reference: MediaRef) -> Any:
    raise AssertionError(reference)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("model")
    build_folder(folder)
    return PromptEncoder(folder, no_media)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> QuestionStream:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [sample(index) for index in range(4)])
    return QuestionStream([(ShardFolder(folder), 1.0)], 0)


INSTANCES = [
    PromptInstance(f"2/new/{i}/q", Question("q", "", (), "1", "math"), "new", "what?")
    for i in range(5)
]


def ahead_of(sampler: GroupSampler, stream: QuestionStream) -> Ahead:
    wave = sampler.start(INSTANCES, SAMPLING, 1, version=1)
    return Ahead(2, 1, (), (), stream.state_dict(), (wave,))


def test_what_two_replicas_saved_one_takes_up_and_asks_for_nothing(
    encoder: PromptEncoder, stream: QuestionStream, tmp_path: Path
) -> None:
    states = []
    for replica in (0, 1):
        exchange = OneOfTwo(replica)
        sampler = GroupSampler(NamingEngine(10 * replica), encoder, NoGrader(), exchange)
        overlap = Overlap(sampler, stream, exchange, Interruption(), last_step=3)
        overlap.ahead = ahead_of(sampler, stream)
        state, files = overlap.state()
        states.append(state)
        for name, content in files.items():
            assert not (tmp_path / name).exists(), "every replica has a file of its own"
            (tmp_path / name).write_bytes(content)
    assert states[0] == states[1], "every rank writes the same state"
    engine = NamingEngine(100)
    sampler = GroupSampler(engine, encoder, NoGrader(), SingleProcess())
    overlap = Overlap(sampler, stream, SingleProcess(), Interruption(), last_step=3)
    overlap.restore(states[0], tmp_path)
    assert overlap.saved is not None
    assert (overlap.saved.step, overlap.saved.version) == (2, 1)
    wave = sampler.start(INSTANCES, SAMPLING, 1, 1, overlap.saved.generations)
    # Replica 0 had the prompts 0, 2 and 4.
    assert [int(group.rollouts[0].response_ids[0]) for group in sampler.finish(wave)] == [
        0,
        10,
        1,
        11,
        2,
    ]
    assert engine.asked == []


def test_what_was_not_saved_is_asked_for(encoder: PromptEncoder) -> None:
    engine = NamingEngine(100)
    sampler = GroupSampler(engine, encoder, NoGrader(), SingleProcess())
    one = Generation(np.array([7]), np.zeros(1, np.float32), "stop")
    saved = {INSTANCES[index].uid: [one] for index in (0, 3)}
    groups = sampler.finish(sampler.start(INSTANCES, SAMPLING, 1, 1, saved))
    assert [int(group.rollouts[0].response_ids[0]) for group in groups] == [7, 100, 101, 7, 102]
    assert engine.asked == [INSTANCES[index].uid for index in (1, 2, 4)]


def test_a_wait_that_was_stopped_is_not_begun_again(
    encoder: PromptEncoder, stream: QuestionStream
) -> None:
    """What an engine drops when a run ends never comes; the checkpoint is written without it."""
    engine = NamingEngine(0, is_stopping=True)
    sampler = GroupSampler(engine, encoder, NoGrader(), SingleProcess())
    overlap = Overlap(sampler, stream, SingleProcess(), Interruption(), last_step=3)
    position = stream.state_dict()
    overlap.ahead = ahead_of(sampler, stream)
    stream.take(1)
    with pytest.raises(StopRequested):
        overlap.settle()
    engine.is_stopping = False
    with pytest.raises(StopRequested):
        overlap.settle()
    assert overlap.state() == (None, {})
    assert overlap.position() == position


def test_what_was_started_for_the_next_step_is_dropped_with_the_one_that_runs(
    encoder: PromptEncoder, stream: QuestionStream
) -> None:
    engine = NamingEngine(0)
    sampler = GroupSampler(engine, encoder, NoGrader(), SingleProcess())
    overlap = Overlap(sampler, stream, SingleProcess(), Interruption(), last_step=3)
    overlap.ahead, overlap.following = ahead_of(sampler, stream), ahead_of(sampler, stream)
    kept = overlap.ahead
    overlap.drop_following()
    assert (overlap.ahead, overlap.following, engine.num_cancelled) == (kept, None, 1)

"""The stream: resume equals no interruption, exact proportions, the same on every rank."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.health import SampleHealth
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.shard_samples import sample

SIZES = (1, 2, 7, 13)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[ShardFolder]:
    root = tmp_path_factory.mktemp("sources")
    made = []
    for size in SIZES:
        write_shards(
            root / str(size), [sample(index, id=f"{size}/{index}") for index in range(size)], 5
        )
        made.append(ShardFolder(root / str(size)))
    return made


def ids(stream: QuestionStream, n: int) -> list[str]:
    return [question.id for question in stream.take(n)]


def sources_of(
    folders: Sequence[ShardFolder], weights: Sequence[float]
) -> list[tuple[ShardFolder, float]]:
    return [
        (folder, weight) for folder, weight in zip(folders, weights, strict=False) if weight > 0
    ]


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.5, 1 / 3]), min_size=4, max_size=4).filter(
        any
    ),
    seed=st.integers(0, 2**40),
    before=st.integers(0, 70),
    after=st.integers(1, 50),
)
def test_resumed_sequence_equals_the_uninterrupted_one(
    folders: list[ShardFolder], weights: list[float], seed: int, before: int, after: int
) -> None:
    sources = sources_of(folders, weights)
    whole = ids(QuestionStream(sources, seed), before + after)
    first = QuestionStream(sources, seed)
    assert ids(first, before) == whole[:before]
    state = json.loads(json.dumps(first.state_dict()))
    look_ahead = first.look_ahead()
    first.take(3)
    assert [question.id for question in look_ahead(after)] == whole[before:]
    assert first.state_dict() != state
    resumed = QuestionStream(sources, seed)
    resumed.load_state_dict(state)
    assert ids(resumed, after) == whole[before:]


def test_every_epoch_holds_every_sample_once_in_another_order(folders: list[ShardFolder]) -> None:
    stream = QuestionStream([(folders[3], 1.0)], seed=5)
    epochs = [ids(stream, 13) for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"13/{index}" for index in range(13))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids(QuestionStream([(folders[3], 1.0)], seed=6), 13) != epochs[0]


@settings(deadline=None, max_examples=40)
@given(weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4), n=st.integers(1, 200))
def test_sources_keep_their_fractions(
    folders: list[ShardFolder], weights: list[float], n: int
) -> None:
    counts = Counter(
        question.split("/")[0]
        for question in ids(QuestionStream(sources_of(folders, weights), 0), n)
    )
    for size, weight in zip(SIZES, weights, strict=True):
        assert abs(counts[str(size)] - n * weight / sum(weights)) < len(SIZES), (
            "never further off than one per source"
        )


def test_weights_of_2_to_1(folders: list[ShardFolder]) -> None:
    # furthest behind first: after 1 question the 13s lag 4/3 - 1, the 7s 2/3; then they alternate
    # 13, 7, 13
    stream = QuestionStream([(folders[3], 2.0), (folders[2], 1.0)], seed=0)
    assert [question.split("/")[0] for question in ids(stream, 6)] == [
        "13",
        "7",
        "13",
        "13",
        "7",
        "13",
    ]


def test_state_does_not_grow_and_resuming_does_not_replay(
    folders: list[ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [(folders[3], 1.0)]
    stream = QuestionStream(sources, 0)
    small = len(json.dumps(stream.state_dict()))
    stream.take(1000)
    state = stream.state_dict()
    assert len(json.dumps(state)) < small + 20
    state["positions"], state["delivered"] = [13 * 10**12], [13 * 10**12]
    resumed = QuestionStream(sources, 0)
    resumed.load_state_dict(state)  # a replay of 10^13 questions would never end
    assert sorted(ids(resumed, 13)) == sorted(f"13/{index}" for index in range(13))


def test_changed_data_are_refused_by_name(folders: list[ShardFolder], tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [sample(index) for index in range(4)])
    saved = QuestionStream([(ShardFolder(tmp_path / "d"), 1.0), (folders[0], 1.0)], 1).state_dict()
    folder = ShardFolder(tmp_path / "d")
    for sources, seed, message in (
        ([(folder, 1.0), (folders[0], 1.0)], 2, "seed was 1, is 2"),
        ([(folder, 1.0)], 1, "number of sources was 2, is 1"),
        ([(folder, 3.0), (folders[0], 1.0)], 1, "fraction was 0.5, is 0.75"),
        ([(folder, 1.0), (folders[1], 1.0)], 1, "num_samples was 1, is 2"),
    ):
        with pytest.raises(DataError, match=message):
            QuestionStream(sources, seed).load_state_dict(saved)
    write_shards(tmp_path / "d", [sample(index) for index in (0, 1, 2, 5)], overwrite=True)
    with pytest.raises(DataError, match=r"source .*d: fingerprint was"):
        QuestionStream([(ShardFolder(tmp_path / "d"), 1.0), (folders[0], 1.0)], 1).load_state_dict(
            saved
        )
    with pytest.raises(DataError, match="another version, got 0"):
        QuestionStream([(folder, 1.0)], 1).load_state_dict({**saved, "version": 0})


def test_bad_samples_are_skipped_counted_and_skipped_again_after_a_resume(tmp_path: Path) -> None:
    bad = {3: {"answer_type": "essay"}, 11: {"choices": ["x"]}, 17: {"media": ["jpg"]}}
    samples = [
        replace(each, question={**each.question, **bad.get(index, {})})
        for index, each in enumerate(map(sample, range(20)))
    ]
    write_shards(tmp_path, samples, 6)
    folder = ShardFolder(tmp_path)
    stream = QuestionStream([(folder, 1.0)], 0, SampleHealth(max_bad_fraction=0.5))
    good = sorted(f"q{index}" for index in range(20) if index not in bad)
    assert [sorted(ids(stream, 17)) for _ in range(3)] == [good, good, good]
    stream.take(17)
    assert stream.health.num_good == 4 * 17
    assert sum(stream.health.counts.values()) in range(9, 13), (
        "three per epoch, those at the end of the last not met yet"
    )
    assert set(stream.health.counts) == {"unknown_answer_type", "bad_choice", "missing_media"}
    resumed = QuestionStream([(folder, 1.0)], 0, SampleHealth(max_bad_fraction=0.5))
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.health.counts == stream.health.counts
    assert ids(resumed, 40) == ids(stream, 40)
    state = json.dumps(stream.state_dict())
    ahead = stream.look_ahead()(40)
    assert json.dumps(stream.state_dict()) == state
    assert [question.id for question in ahead] == ids(stream, 40)
    with pytest.raises(
        DataError, match=r"too many bad samples, got \d of \d+ .*expected at most 5.0%"
    ):
        QuestionStream([(folder, 1.0)], 0).take(40)
    with pytest.raises(DataError, match="is bad"):
        QuestionStream([(folder, 1.0)], 0, SampleHealth(strict=True)).take(20)


def test_a_source_without_a_good_sample_ends_instead_of_turning_for_ever(tmp_path: Path) -> None:
    write_shards(tmp_path, [sample(index, answer_type="essay") for index in range(3)])
    stream = QuestionStream([(ShardFolder(tmp_path), 1.0)], 0, SampleHealth(max_bad_fraction=1.0))
    with pytest.raises(DataError, match="no good sample in a whole epoch, got 3 bad ones"):
        stream.take(1)


def test_wrong_sources_are_refused(folders: list[ShardFolder]) -> None:
    with pytest.raises(DataError, match="no sources"):
        QuestionStream([], 0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="weight is not positive"):
            QuestionStream([(folders[0], weight)], 0)

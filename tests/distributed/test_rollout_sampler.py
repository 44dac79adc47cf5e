"""Groups and questions are the same on every rank and do not depend on how many replicas share the
sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import MediaError
from data.health import SampleHealth
from data.media.opening import Frames
from data.question import MediaRef, Question
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream
from tests.support.launch import run_ranks
from tests.support.tiny_folder import build_model
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.experience import Group, PromptInstance
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model as build_network
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.weights.mapping import load_hf_weights

BROKEN = ("k2", "k9")


def open_media(reference: MediaRef) -> Frames:
    if reference.key in BROKEN:
        raise MediaError("unreadable", "cannot decode")
    return Frames(np.full((1, 16, 16, 3), len(reference.key), np.uint8), (0.0,))


def open_media_on_rank_zero_only(reference: MediaRef) -> Frames:
    """A decoder that runs into its time limit on one rank of a replica."""
    if parallel.rank() and reference.key == "k4":
        raise MediaError("timeout", "too slow")
    return open_media(reference)


class LengthGrader:
    """Right is a response of even length; counts how many it graded on this rank."""

    def __init__(self) -> None:
        self.num_graded = 0

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        self.num_graded += len(items)
        return [Verdict(str(len(text)), float(len(text) % 2 == 0), "match") for _, text in items]


def describe(groups: Sequence[Group]) -> list[Any]:
    return [
        (
            group.uid,
            group.prompt.token_ids.tolist(),
            [(r.response_ids.tolist(), r.text, r.reward) for r in group.rollouts],
        )
        for group in groups
    ]


def take_and_sample(folder: Path, shards: Path, tensor: int) -> dict[str, Any]:
    layout = ParallelConfig(tensor_model_parallel_size=tensor)
    parallel.initialize(layout, 0)
    network = build_network(
        load_architecture(folder),
        ModelConfig(transformer_impl="local", params_dtype="float32"),
        layout,
    )
    load_hf_weights(network, folder)
    exchange, grader, health = (
        ParallelExchange(),
        LengthGrader(),
        SampleHealth(max_bad_fraction=0.5),
    )
    encoder = PromptEncoder(folder, open_media)
    stream = QuestionStream([(ShardFolder(shards), 1.0)], 3, health)
    feed = QuestionFeed(
        stream,
        encoder,
        health,
        exchange,
        plain_text=lambda question: question.text,
        max_prompt_tokens=60,
    )
    questions = feed.take(7) + feed.take(2)
    sampler = GroupSampler(MegatronEngine(network, 0, max_batch_size=8), encoder, grader, exchange)
    instances = [
        PromptInstance(f"1/new/{question.id}", question, "new", question.text)
        for question in questions
    ]
    instances += [
        PromptInstance(f"1/bcq/{question.id}", question, "bcq", question.text * 2)
        for question in questions[:3]
    ]
    sampling = SamplingParams(
        temperature=1.0, max_new_tokens=10, stop_token_ids=encoder.stop_token_ids
    )
    results = {
        "questions": [question.id for question in questions],
        "health": (health.num_good, health.counts),
        "groups": describe(sampler.sample(instances, sampling, 3, 1)),
        "num_graded": grader.num_graded,
    }
    half_blind = PromptEncoder(folder, open_media_on_rank_zero_only)
    sampler = GroupSampler(MegatronEngine(network, 0), half_blind, grader, exchange)
    fourth = Question("q4", "t", (MediaRef("image", "s", "k4", "png"),), "1", "math")
    alone = [PromptInstance("1/new/q4", fourth, "new", "t"), instances[0]]
    results["half_blind"] = [group.uid for group in sampler.sample(alone, sampling, 1, 1)]
    results["failures"] = dict(sampler.failures)
    parallel.shutdown()
    return results


@pytest.mark.timeout(700)  # two starts of two ranks each, on a machine that may be busy
def test_replicas_and_tensor_ranks_agree(tmp_path: Path) -> None:
    build_model(tmp_path / "model")
    samples = []
    for index in range(12):
        fields = {
            "id": f"q{index}",
            "question": "w" * (90 if index == 5 else index),
            "answer": "1",
            "answer_type": "math",
        }
        samples.append(ShardSample(f"k{index}", fields, [("png", b"x")]))
    write_shards(tmp_path / "shards", samples)
    replicas, tensor = (
        run_ranks(take_and_sample, 2, tmp_path / "model", tmp_path / "shards", size)
        for size in (1, 2)
    )
    everything = [*replicas, *tensor]
    assert len(set(tensor[0]["questions"]) & {"q2", "q5", "q9"}) == 0
    for name in ("questions", "health", "groups"):
        assert all(result[name] == tensor[0][name] for result in everything), name
    assert len(tensor[0]["groups"]) == 12
    assert [result["num_graded"] for result in everything] == [18, 18, 36, 0]
    # Replica 0 opens the slow image; with two tensor ranks one of them cannot, and both leave it
    # out.
    assert [len(result["half_blind"]) for result in everything] == [2, 2, 1, 1]
    assert [result["failures"] for result in everything] == [{}, {}, {"timeout": 1}, {"timeout": 1}]

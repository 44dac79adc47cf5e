"""Logits that are not finite: their groups are left out and counted, a broken network ends the run
on every rank alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.question import MediaRef, Question
from tests.distributed.test_rollout_engine import (
    LOGPROB_TOLERANCE,
    NEW_TOKENS,
    QUESTIONS,
    open_media,
    params,
    request,
)
from tests.support.launch import run_ranks
from tests.support.tiny_folder import build_model
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import NotFiniteError
from zppo_mm.experience import PromptInstance
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model as build_network
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.teacher.served.rank_server import NoGrader
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = pytest.mark.timeout(700)  # a start of two ranks takes a minute on a busy machine
SEED = 11
NUM_ROLLOUTS = 4
LAYOUTS = {"alone": (1, 1), "tensor": (2, 1), "pipeline": (1, 2)}


class PoisonedMedia:
    """An engine to which the pixels of chosen prompts come as NaN."""

    def __init__(self, engine: MegatronEngine, poisoned: set[str]) -> None:
        self._engine = engine
        self._poisoned = poisoned

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        return self._engine.generate(
            [
                self._poison(each) if each.seed_path[-1] in self._poisoned else each
                for each in requests
            ],
            sampling,
        )

    def _poison(self, item: GenerationRequest) -> GenerationRequest:
        vision = tuple(
            dataclasses.replace(each, patches=np.full_like(each.patches, np.nan))
            for each in item.vision
        )
        return dataclasses.replace(item, vision=vision)


def build(folder: Path, tensor: int, pipeline: int, dtype: str) -> VisionLanguageModel:
    layout = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    parallel.initialize(layout, SEED)
    network = build_network(
        load_architecture(folder), ModelConfig(transformer_impl="local", params_dtype=dtype), layout
    )
    load_hf_weights(network, folder)
    return network


def plain(groups: list[list[Generation]]) -> list[list[tuple[list[int], list[float], bool]]]:
    return [
        [
            (each.response_ids.tolist(), each.rollout_logprobs.tolist(), each.is_broken)
            for each in group
        ]
        for group in groups
    ]


@torch.no_grad()
def poison_token(network: VisionLanguageModel, token: int) -> None:
    """Make a token's embedding NaN, on the rank that has it."""
    if network.pre_process:
        embedding = network.language_model.embedding.word_embeddings
        first, last = embedding.vocab_start_index, embedding.vocab_end_index
        if first <= token < last:
            embedding.weight[token - first] = torch.nan


def sample(folder: Path, tensor: int, pipeline: int, dtype: str) -> dict[str, Any]:
    """Sample from a sound network, with a poisoned medium, with a poisoned token, and from a broken
    output layer.
    """
    network = build(folder, tensor, pipeline, dtype)
    encoder = PromptEncoder(folder, open_media)
    engine = MegatronEngine(network, SEED, max_batch_size=12)
    requests = [request(encoder, name, NUM_ROLLOUTS) for name in QUESTIONS]
    settings = {
        "plain": params(encoder, 1.0, stop_early=True),
        "filtered": params(encoder, 0.7, top_k=20, top_p=0.9, presence_penalty=1.5),
    }
    results: dict[str, Any] = {
        "sound": {name: plain(engine.generate(requests, each)) for name, each in settings.items()}
    }
    poisoned = PoisonedMedia(engine, {"image"})
    results["medium"] = {
        name: plain(poisoned.generate(requests, each)) for name, each in settings.items()
    }
    prompts = {int(token) for each in requests for token in each.prompt.token_ids}
    drawn = [
        token for group in results["sound"]["plain"] for ids, _, _ in group for token in ids[:-1]
    ]
    token = next(token for token in drawn if token not in prompts)
    poison_token(network, token)
    results["token"] = (token, plain(engine.generate(requests, settings["plain"])))
    results["output"] = break_output(network, encoder, engine)
    parallel.shutdown()
    return results


@torch.no_grad()
def break_output(
    network: VisionLanguageModel, encoder: PromptEncoder, engine: MegatronEngine
) -> tuple[str, list[str | None], int]:
    """Break one row of the output layer on the last tensor rank; returns the error, and what a
    rewrite and a single prompt give.
    """
    if network.post_process and parallel.tensor_rank() == parallel.tensor_size() - 1:
        network.language_model.output_layer.weight[3] = torch.inf
    sampler, other = (
        GroupSampler(engine, encoder, NoGrader(), ParallelExchange()) for _ in range(2)
    )
    sampling = params(encoder, 1.0)
    instances = [
        PromptInstance(f"1/new/{name}", question(name), "new", name) for name in ("a", "b")
    ]
    replies = other.respond(["x"], sampling, "alone")
    left = sum(len(sampler.sample(instances[:1], sampling, 2, step)) for step in range(3))
    try:
        sampler.sample(instances[1:], sampling, 2, 3)
    except NotFiniteError as error:
        return str(error), replies, left
    return "", replies, left


def question(name: str, *kinds: str) -> Question:
    media = tuple(MediaRef(kind, "s.tar", name, "x") for kind in kinds)
    return Question(id=name, text=name, media=media, answer="1", answer_type="math")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


def assert_same(
    one: tuple[list[int], list[float], bool], other: tuple[list[int], list[float], bool], dtype: str
) -> None:
    """Sequences that leave the batch at another time change the order of sums: in bfloat16 another
    token may come of it.
    """
    assert not one[2]
    assert np.isfinite(one[1]).all()
    if dtype == "float32":
        assert one[0] == other[0]
        assert np.abs(np.array(one[1]) - other[1]).max() <= LOGPROB_TOLERANCE
    else:
        assert one[0][0] == other[0][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_is_broken_ends_and_where_it_broke(folder: Path, layout: str, dtype: str) -> None:
    tensor, pipeline = LAYOUTS[layout]
    ranks = run_ranks(sample, tensor * pipeline, folder, tensor, pipeline, dtype)
    for result in ranks:
        assert result == ranks[0]
    result = ranks[0]
    row = list(QUESTIONS).index("image")
    for name, sound in result["sound"].items():
        found = result["medium"][name]
        assert found[row] == [([], [], True)] * NUM_ROLLOUTS, name
        assert not any(is_broken for group in sound for _, _, is_broken in group), name
        for group, expected in zip(
            found[:row] + found[row + 1 :], sound[:row] + sound[row + 1 :], strict=True
        ):
            for one, other in zip(group, expected, strict=True):
                assert_same(one, other, dtype)
    token, groups = result["token"]
    num_broken = 0
    for group, sound in zip(groups, result["sound"]["plain"], strict=True):
        for (ids, logprobs, is_broken), (sound_ids, sound_logprobs, _) in zip(
            group, sound, strict=True
        ):
            assert token not in ids[:-1]
            assert is_broken == (ids[-1:] == [token] and len(ids) < NEW_TOKENS)
            num_broken += is_broken
            if is_broken:
                assert_same(
                    (ids, logprobs, False),
                    (sound_ids[: len(ids)], sound_logprobs[: len(ids)], False),
                    dtype,
                )
    assert 0 < num_broken < len(QUESTIONS) * NUM_ROLLOUTS
    message, replies, left = result["output"]
    # A single question is left out; two different ones, one after the other, are the network's
    # fault.
    assert (replies, left) == ([None], 0)
    assert "sampling: the network is broken, got logits that are not finite for" in message
    assert "question 'a': rollout 0, token 0 of the response, drawn on rank" in message


def sample_on_replicas(folder: Path) -> dict[str, Any]:
    """One medium is poisoned on one replica; then all weights of that replica are."""
    network = build(folder, 1, 1, "float32")
    encoder = PromptEncoder(folder, open_media)
    engine = MegatronEngine(network, SEED)
    sampling = SamplingParams(
        temperature=1.0, max_new_tokens=4, stop_token_ids=encoder.stop_token_ids
    )
    instances = [
        PromptInstance(f"q{n}", question(f"q{n}", "image"), "new", f"text {n}") for n in range(12)
    ]
    sampler = GroupSampler(PoisonedMedia(engine, {"q5"}), encoder, NoGrader(), ParallelExchange())
    groups = [group.uid for group in sampler.sample(instances, sampling, 2, 1)]
    failed = (dict(sampler.failures), dict(sampler.failed))
    if parallel.rank() == 1:
        with torch.no_grad():
            network.language_model.output_layer.weight.fill_(torch.nan)
    try:
        sampler.sample(instances, sampling, 2, 2)
    except NotFiniteError as error:
        message = str(error)
    parallel.shutdown()
    return {"groups": groups, "failed": failed, "message": message}


def test_replicas_decide_alike(folder: Path) -> None:
    first, second = run_ranks(sample_on_replicas, 2, folder)
    assert first == second
    assert first["groups"] == [f"q{n}" for n in range(12) if n != 5]
    assert first["failed"] == ({"not_finite": 1}, {"q5": "not_finite"})
    # 12 prompts of which one broke, then 12 of which 6 did.
    assert "not finite for 7 of the last 24 prompts" in first["message"]
    assert (
        "(question 'q5': rollout 0, token 0 of the response, drawn on rank 1; question 'q1': "
        in first["message"]
    )

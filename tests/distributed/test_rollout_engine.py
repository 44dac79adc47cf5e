"""The Megatron engine against transformers' generate, against the training forward pass, and
against itself in other layouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.crowding import crowded, forward_logprobs
from tests.support.launch import run_ranks
from tests.support.tiny_folder import build_model
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model as build_network
from zppo_mm.parallel import groups as parallel
from zppo_mm.parity.oracle import SourceInput, model_inputs
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = pytest.mark.timeout(700)  # a start of two ranks takes a minute on a busy machine
SEED = 11
# Decoding and training sum the same float32 products in other orders; the bound that training
# relies on.
LOGPROB_TOLERANCE = 1e-4
NEW_TOKENS = 24
QUESTIONS = {
    "text": ("the sum of 1 and 2?", ()),
    "image": ("what is it?", ("image",)),
    "video": ("what happens here, in the end?", ("video",)),
    "mixed": ("compare", ("image", "video", "image")),
    "short": ("x", ()),
}
TOO_LONG = "and again " * 60


def open_media(reference: MediaRef) -> Frames:
    rng = np.random.default_rng(len(reference.key))
    if reference.kind == "image":
        return Frames(rng.integers(0, 256, (1, 16, 24, 3), dtype=np.uint8), (0.0,))
    return Frames(rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8), (0.0, 0.5, 1.0, 1.5, 2.0))


def request(encoder: PromptEncoder, name: str, num_rollouts: int) -> GenerationRequest:
    text, kinds = QUESTIONS.get(name, (name, ()))
    media = tuple(
        MediaRef(kind, "s.tar", "k" * (index + 1), "x") for index, kind in enumerate(kinds)
    )
    prompt, vision = encoder.encode(
        text, Question(id=name, text=text, media=media, answer="1", answer_type="math")
    )
    return GenerationRequest(prompt, vision, num_rollouts, ("rollout", name))


def params(encoder: PromptEncoder, temperature: float, **changes: Any) -> SamplingParams:
    # Many stop tokens, so that random weights end some responses early and the batch shrinks while
    # it is decoded.
    stops = (
        (*encoder.stop_token_ids, *range(40, 48))
        if changes.pop("stop_early", False)
        else encoder.stop_token_ids
    )
    return SamplingParams(
        temperature=temperature, max_new_tokens=NEW_TOKENS, stop_token_ids=stops, **changes
    )


def sample_everything(folder: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """Run on every rank: all kinds of prompts, greedy and sampled, together and alone."""
    layout = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    parallel.initialize(layout, SEED)
    network = build_network(
        load_architecture(folder),
        ModelConfig(transformer_impl="local", params_dtype="float32"),
        layout,
    )
    load_hf_weights(network, folder)
    network.train()
    encoder = PromptEncoder(folder, open_media)
    engine = MegatronEngine(network, SEED, max_batch_size=12)
    everything = [request(encoder, name, 3) for name in QUESTIONS]
    early = params(encoder, 1.0, stop_early=True)
    results: dict[str, Any] = {
        "greedy": engine.generate(
            [request(encoder, name, 1) for name in QUESTIONS], params(encoder, 0.0)
        ),
        "sampled": engine.generate(everything, early),
        "alone": [engine.generate([item], early)[0] for item in everything[:2]],
        "filtered": engine.generate(
            everything, params(encoder, 0.8, top_k=20, top_p=0.9, presence_penalty=1.5)
        ),
        "crowded": crowded(network, SEED, everything, NEW_TOKENS).generate(everything, early),
        "no_room": crowded(network, SEED, everything, NEW_TOKENS).generate(
            [request(encoder, TOO_LONG, 3), *everything[1:2]], early
        ),
        "still_training": network.training,
    }
    if tensor * pipeline == 1:
        small = MegatronEngine(network, SEED, max_batch_size=2, max_prefill_tokens=50)
        results["small_waves"] = small.generate(everything, early)
        results["forward"] = [
            [forward_logprobs(network, item, generation) for generation in group]
            for item, group in zip(everything, results["sampled"], strict=True)
        ]
        results["one_token"] = engine.generate(
            everything[:1], SamplingParams(temperature=1.0, max_new_tokens=1, stop_token_ids=())
        )
        results["nothing"] = engine.generate([], early)
    parallel.shutdown()
    return results


def transformers_greedy(folder: Path, name: str) -> list[int]:
    from transformers import Qwen3_5ForConditionalGeneration

    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = PromptEncoder(folder, open_media)
    item = request(encoder, name, 1)
    source = SourceInput(item.prompt.token_ids, item.prompt.positions, 0, item.vision)
    placeholders = [encoder.chat.image_token_id, encoder.chat.video_token_id]
    output = model.generate(
        **model_inputs(model.config, source),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=placeholders,
    )
    return output[0, len(item.prompt.token_ids) :].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    return run_ranks(sample_everything, 1, folder, 1, 1)[0]


def tokens(groups: list[list[Generation]]) -> list[list[list[int]]]:
    return [[generation.response_ids.tolist() for generation in group] for group in groups]


def test_greedy_equals_transformers_generate(folder: Path, single: dict[str, Any]) -> None:
    for name, group in zip(QUESTIONS, single["greedy"], strict=True):
        assert group[0].response_ids.tolist() == transformers_greedy(folder, name), name


def test_logprobs_equal_the_training_forward_pass(single: dict[str, Any]) -> None:
    for group, forward in zip(single["sampled"], single["forward"], strict=True):
        for generation, expected in zip(group, forward, strict=True):
            assert np.abs(generation.rollout_logprobs - expected).max() <= LOGPROB_TOLERANCE


def test_draws_do_not_depend_on_the_batch(single: dict[str, Any]) -> None:
    together = tokens(single["sampled"])
    assert tokens(single["alone"]) == together[:2]
    assert tokens(single["small_waves"]) == together
    assert len({tuple(response) for group in together for response in group}) > len(together)


def test_sequences_that_make_room_for_others_are_sampled_the_same(single: dict[str, Any]) -> None:
    crowded = single["crowded"]
    assert tokens(crowded) == tokens(single["sampled"])
    assert sum(each.num_preemptions for group in crowded for each in group) > 0
    assert not any(each.num_preemptions for group in single["sampled"] for each in group)
    for group, expected in zip(crowded, single["sampled"], strict=True):
        for generation, other in zip(group, expected, strict=True):
            difference = np.abs(generation.rollout_logprobs - other.rollout_logprobs)
            assert difference.max() <= LOGPROB_TOLERANCE


def test_a_prompt_without_room_is_refused_alone(single: dict[str, Any]) -> None:
    assert tokens(single["no_room"]) == [[], tokens(single["sampled"])[1]]


def test_responses_end_as_asked(folder: Path, single: dict[str, Any]) -> None:
    stops = set(params(PromptEncoder(folder, open_media), 1.0, stop_early=True).stop_token_ids)
    reasons = set()
    for group in single["sampled"]:
        for generation in group:
            *before, last = generation.response_ids.tolist()
            assert not stops & set(before)
            assert generation.finish_reason == ("stop" if last in stops else "length")
            assert generation.finish_reason == "stop" or len(generation.response_ids) == NEW_TOKENS
            assert len(generation.rollout_logprobs) == len(generation.response_ids)
            reasons.add(generation.finish_reason)
    assert reasons == {"stop", "length"}
    assert [
        [len(generation.response_ids) for generation in group] for group in single["one_token"]
    ] == [[1, 1, 1]]
    assert single["nothing"] == []
    assert single["still_training"]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_other_layouts_sample_the_same(
    folder: Path, single: dict[str, Any], tensor: int, pipeline: int
) -> None:
    for results in run_ranks(sample_everything, tensor * pipeline, folder, tensor, pipeline):
        for name in ("greedy", "sampled", "alone", "filtered", "crowded", "no_room"):
            assert tokens(results[name]) == tokens(single[name]), name
        for group, expected in zip(results["sampled"], single["sampled"], strict=True):
            for generation, other in zip(group, expected, strict=True):
                assert (
                    np.abs(generation.rollout_logprobs - other.rollout_logprobs).max()
                    <= LOGPROB_TOLERANCE
                )
        assert results["still_training"]

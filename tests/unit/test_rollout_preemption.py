"""Sequences that make room for others in the decoding cache, in every kind of network: their
responses are those of a cache with room for all.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from encoders.processor import VisionInput
from tests.support import network_checks, tiny_families
from tests.support.crowding import crowded, forward_logprobs
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.experience import Prompt
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine

pytestmark = pytest.mark.usefixtures("one_rank")
SEED = 3
NEW_TOKENS = 24
# Some responses of random weights end early.
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=NEW_TOKENS, stop_token_ids=(40, 41))
FAMILIES = {"qwen3_5": "mixed", "qwen3_vl": "mixed", "qwen2_5_vl": "mixed", "qwen3": "text"}
# Float32 sums in another order.
TOLERANCE = 1e-4
# The rounding of the network's bfloat16 activations, in nats, on average and at most; a recomputed
# response that is off by one position goes beyond them.
MEAN_BFLOAT16, MAX_BFLOAT16 = 0.02, 0.1


def requests_of(family: str) -> list[GenerationRequest]:
    requests = []
    for number, part in enumerate(tiny_families.sequences(family, FAMILIES[family])):
        bounds = np.cumsum([0, *(t * h * w for t, h, w in part.grids)])
        media = zip(part.kinds, part.grids, bounds, bounds[1:], strict=False)
        vision = [
            VisionInput(kind, part.patches[first:last].numpy(), grid)  # type: ignore[arg-type]
            for kind, grid, first, last in media
        ]
        prompt = Prompt(
            "", part.token_ids.numpy(), part.positions.numpy(), part.next_position, part.grids
        )
        requests.append(GenerationRequest(prompt, tuple(vision), 5, ("rollout", number)))
    return requests


def network_of(family: str, folder: Path, params_dtype: str) -> VisionLanguageModel:
    options = ModelConfig(params_dtype=params_dtype)
    saved, _ = tiny_families.folder(family, folder)
    return network_checks.build(saved, ParallelConfig(), options)


def num_preemptions(groups: list[list[Generation]]) -> int:
    return sum(each.num_preemptions for group in groups for each in group)


@pytest.mark.parametrize("family", FAMILIES)
def test_preempted_responses_are_the_same(tmp_path: Path, family: str) -> None:
    network = network_of(family, tmp_path, "float32")
    requests = requests_of(family)
    roomy = MegatronEngine(network, SEED).generate(requests, SAMPLING)
    narrow = crowded(network, SEED, requests, NEW_TOKENS).generate(requests, SAMPLING)
    assert (num_preemptions(roomy), num_preemptions(narrow) > 0) == (0, True)
    for ours, theirs in zip(
        (each for group in narrow for each in group),
        (each for group in roomy for each in group),
        strict=True,
    ):
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        np.testing.assert_allclose(ours.rollout_logprobs, theirs.rollout_logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_preempted_responses_have_the_log_probs_of_the_training_pass_in_bfloat16(
    tmp_path: Path, family: str
) -> None:
    """Other ids may be drawn: rounding depends on the batch."""
    network = network_of(family, tmp_path, "bfloat16")
    requests = requests_of(family)
    narrow = crowded(network, SEED, requests, NEW_TOKENS).generate(requests, SAMPLING)
    errors = [
        np.abs(each.rollout_logprobs - forward_logprobs(network, request, each))
        for request, group in zip(requests, narrow, strict=True)
        for each in group
        if each.num_preemptions
    ]
    assert errors
    assert np.concatenate(errors).mean() <= MEAN_BFLOAT16
    assert np.concatenate(errors).max() <= MAX_BFLOAT16


def test_a_limit_on_the_patches_of_a_prefill_changes_no_response(tmp_path: Path) -> None:
    network = network_of("qwen3_5", tmp_path, "float32")
    requests = requests_of("qwen3_5")
    sizes = [sum(math.prod(grid) for grid in each.prompt.grids) for each in requests]
    seen: list[int] = []
    assert network.vision is not None
    network.vision.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    limits = (sys.maxsize, max(sizes), 1)
    sampled = [
        MegatronEngine(network, SEED, max_prefill_patches=limit).generate(requests, SAMPLING)
        for limit in limits
    ]
    alone = sorted(size for size in sizes if size)
    assert len(alone) == 2
    assert sorted(seen) == sorted([sum(alone), *alone, *alone])
    for groups in sampled[1:]:
        assert [[each.response_ids.tolist() for each in group] for group in groups] == [
            [each.response_ids.tolist() for each in group] for group in sampled[0]
        ]

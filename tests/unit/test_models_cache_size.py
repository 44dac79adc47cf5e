"""The memory of the decoding cache: counted, held, and at the shapes of the paper's students."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import network_checks, tiny_qwen
from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.schema import ParallelConfig, RolloutConfig
from zppo_mm.errors import ConfigError
from zppo_mm.experience import Prompt
from zppo_mm.models.decoding.cache_size import GIB, CacheSize
from zppo_mm.models.decoding.decode import prefill
from zppo_mm.models.families.architecture import Architecture, parse_architecture
from zppo_mm.models.layers.cache import Admission, DecodeCache
from zppo_mm.rollout.admission import AdmissionQueue
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.megatron_engine import MegatronEngine

ROWS, PROMPT, RESPONSE, ROLLOUTS = 128, 4096, 12288, 8
BUDGET = int(RolloutConfig().cache_memory_gib * GIB)


def architecture_of(size: str) -> Architecture:
    return parse_architecture(PUBLISHED[f"Qwen3.5-{size}"][0])


@pytest.mark.usefixtures("one_rank")
def test_the_cache_holds_what_is_counted(tmp_path: Path) -> None:
    folder = tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path)
    network = network_checks.build(folder, ParallelConfig())
    cache = DecodeCache(num_blocks=9, max_rows=5, slots_per_block=16)
    prefill(network, **tiny_qwen.pack(tiny_qwen.sequences("image")), cache=cache)
    held = sum(blocks.nbytes for blocks in cache.attention.values()) + sum(
        state.inputs.nbytes + state.state.nbytes for state in cache.linear.values()
    )
    size = CacheSize.of(network.architecture, 1, 1, 4, 16)
    assert held == size.num_bytes(9, 5)
    assert size.num_blocks(held, 5) == 9
    assert size.num_blocks(held - 1, 5) == 8


def text_request(length: int) -> GenerationRequest:
    ids = np.ones(length, np.int64)
    return GenerationRequest(Prompt("", ids, np.tile(ids, (3, 1)), length), (), 1, ("x",))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("new_tokens", [1, 2])
def test_a_prompt_with_room_for_its_rollouts_is_computed_once(
    tmp_path: Path, new_tokens: int
) -> None:
    folder = tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path)
    network = network_checks.build(folder, ParallelConfig())
    prefills: list[int] = []
    # Steps of one token do not pass through it.
    network.language_model.decoder.register_forward_hook(lambda *_: prefills.append(1))
    ids = np.arange(1, 21)
    request = GenerationRequest(Prompt("", ids, np.tile(ids, (3, 1)), 21), (), 8, ("x",))
    sampling = SamplingParams(temperature=1.0, max_new_tokens=new_tokens, stop_token_ids=())
    (group,) = MegatronEngine(network, 0, 8).generate([request], sampling)
    assert [len(each.response_ids) for each in group] == [new_tokens] * 8
    assert len(prefills) == 1


@pytest.mark.usefixtures("one_rank")
def test_a_sequence_that_never_fits_is_refused_alone(tmp_path: Path) -> None:
    folder = tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path)
    network = network_checks.build(folder, ParallelConfig())
    size = CacheSize.of(network.architecture, 1, 1, 4)
    engine = MegatronEngine(network, 0, 1, cache_bytes=size.num_bytes(3, 1))
    engine.check_longest(128, 256)
    message = r"cache_memory_gib: too little for one sequence.* a prompt of 129 and a response of"
    with pytest.raises(ConfigError, match=message):
        engine.check_longest(129, 256)
    # The last token of a response is not kept: 257 take two blocks.
    sampling = SamplingParams(temperature=1.0, max_new_tokens=257, stop_token_ids=())
    short, long = (text_request(length) for length in (128, 129))
    (alone,) = engine.generate([short], sampling)
    (first, none, last) = engine.generate([short, long, short], sampling)
    assert none == []
    for group in (first, last):
        assert group[0].response_ids.tolist() == alone[0].response_ids.tolist()
    assert engine.generate([long], sampling) == [[]]


def test_the_stage_with_least_room_decides() -> None:
    architecture = architecture_of("9B")
    whole, halves = (CacheSize.of(architecture, 1, stages, 2) for stages in (1, 2))
    assert sum(halves.block_bytes) == whole.block_bytes[0]
    assert sum(halves.row_bytes) == whole.row_bytes[0]
    assert halves.num_blocks(BUDGET, ROWS) == min(
        (BUDGET - ROWS * row) // block
        for block, row in zip(halves.block_bytes, halves.row_bytes, strict=True)
    )


@pytest.mark.parametrize(("name", "whole_gib"), [("2B", 24), ("9B", 64)])
def test_published_shapes_stay_within_the_budget(name: str, whole_gib: int) -> None:
    """Every response grows to its limit, decided as the engine decides, without any tensor."""
    size = CacheSize.of(architecture_of(name), 1, 1, 2)
    # 128 sequences of 16,384 tokens at once, with a copy of the prompt each.
    keys = size.block_bytes[0] * size.blocks_of(PROMPT + RESPONSE) * ROWS
    assert keys == whole_gib * GIB
    num_blocks = size.num_blocks(BUDGET, ROWS)
    assert num_blocks is not None
    assert size.num_bytes(num_blocks, ROWS) <= BUDGET
    ids = np.zeros(PROMPT, np.int64)
    prompt = Prompt("", ids, np.zeros((3, PROMPT), np.int64), PROMPT)
    requests = [GenerationRequest(prompt, (), ROLLOUTS, ()) for _ in range(ROWS // ROLLOUTS)]
    queue = AdmissionQueue(requests, ROWS, 1 << 16)
    cache = DecodeCache(num_blocks, ROWS)
    taken = queue.take(cache)
    while taken:
        bounds = torch.arange(0, (len(taken) + 1) * PROMPT, PROMPT, dtype=torch.int32)
        admissions = [Admission(each.request, PROMPT, len(each.rollouts)) for each in taken]
        cache.begin(bounds, admissions, torch.bfloat16)
        taken = queue.take(cache)
    # All prompts are there: shared, they take an eighth of what copies would.
    assert cache.batch_size == ROWS
    most_used = 0
    for _ in range(RESPONSE - 1):
        while cache.num_missing_blocks > 0:
            cache.release(np.array([cache.batch_size - 1]))
        cache.extend(torch.device("cpu"))
        most_used = max(most_used, num_blocks - cache.num_free_blocks)
    assert most_used <= num_blocks
    assert 0 < cache.batch_size <= ROWS

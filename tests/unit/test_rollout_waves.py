"""Waves and the bookkeeping of a decoding batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_mm.experience import Prompt
from zppo_mm.rollout.batch import UNIFORM_BLOCK, RolloutBatch, UniformStreams
from zppo_mm.rollout.engine import GenerationRequest, SamplingParams
from zppo_mm.rollout.waves import plan_waves

STOP = 9


def request(length: int, num_rollouts: int) -> GenerationRequest:
    prompt = Prompt("", np.zeros(length, np.int64), np.zeros((3, length), np.int64), length)
    return GenerationRequest(prompt, (), num_rollouts, ("x",))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), max_size=12),
    st.integers(1, 12),
    st.integers(1, 100),
)
def test_waves_hold_every_rollout_once_within_the_limits(
    sizes: list[tuple[int, int]], max_batch_size: int, max_tokens: int
) -> None:
    requests = [request(*size) for size in sizes]
    waves = plan_waves(requests, max_batch_size, max_tokens)
    planned = [
        (part.request, part.first + offset)
        for wave in waves
        for part in wave
        for offset in range(part.count)
    ]
    assert sorted(planned) == [
        (index, rollout) for index, (_, count) in enumerate(sizes) for rollout in range(count)
    ]
    for wave in waves:
        assert sum(part.count for part in wave) <= max_batch_size
        assert len(wave) == 1 or sum(sizes[part.request][0] for part in wave) <= max_tokens
    whole = [part for wave in waves for part in wave if sizes[part.request][1] <= max_batch_size]
    assert all(part.count == sizes[part.request][1] for part in whole)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, STOP), min_size=6, max_size=6), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_batch_keeps_each_sequence_up_to_its_stop(
    responses: list[list[int]], drops: list[bool]
) -> None:
    """Sequence i is fed responses[i]; sequences that ended are dropped at arbitrary steps."""
    sampling = SamplingParams(
        temperature=1.0, max_new_tokens=6, stop_token_ids=(STOP,), presence_penalty=1.0
    )
    batch = RolloutBatch(
        [100 * index for index in range(len(responses))], sampling, STOP + 1, torch.device("cpu")
    )
    left = list(range(len(responses)))
    for step in range(6):
        tokens = torch.tensor([responses[row][step] for row in left])
        batch.append(tokens, -tokens.float())
        assert (
            batch.positions()[:, :].tolist() == [[100 * sequence + step for sequence in left]] * 3
        )
        for row, sequence in enumerate(left):
            assert set(torch.nonzero(batch.seen[row]).squeeze(1).tolist()) == set(
                responses[sequence][: step + 1]
            )
        if batch.num_active == 0:
            break
        if drops[step]:
            left = [left[index] for index in batch.drop_finished().tolist()]
            assert all(STOP not in responses[row][: step + 1] for row in left)
            assert (
                list(range(len(responses))) if batch.rows is None else batch.rows.tolist()
            ) == left
    for response, generation in zip(responses, batch.generations(), strict=True):
        length = response.index(STOP) + 1 if STOP in response else 6
        assert generation.response_ids.tolist() == response[:length]
        assert generation.rollout_logprobs.tolist() == [
            -float(token) for token in response[:length]
        ]
        assert generation.finish_reason == ("stop" if STOP in response else "length")


def test_uniform_streams_follow_each_generator_across_blocks() -> None:
    streams = UniformStreams([np.random.Generator(np.random.Philox(key=seed)) for seed in range(3)])
    expected = np.stack(
        [
            np.random.Generator(np.random.Philox(key=seed)).random(2 * UNIFORM_BLOCK)
            for seed in range(3)
        ]
    )
    for step in range(2 * UNIFORM_BLOCK):
        assert np.array_equal(streams.column(step, None).numpy(), expected[:, step])
    assert (
        streams.column(2 * UNIFORM_BLOCK - 1, torch.tensor([2, 0])).tolist()
        == expected[[2, 0], -1].tolist()
    )

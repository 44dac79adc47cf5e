"""The bookkeeping of a decoding batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_mm.experience import NO_TOKEN
from zppo_mm.models.layers.cache import Admission, DecodeCache
from zppo_mm.rollout.admission import NO_IDS, NO_LOGPROBS
from zppo_mm.rollout.batch import UNIFORM_BLOCK, RolloutBatch, UniformStreams
from zppo_mm.rollout.engine import SamplingParams

STOP, NUM_STEPS, MAX_ROWS = 9, 6, 3


def stream(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(-1, STOP), min_size=NUM_STEPS, max_size=NUM_STEPS),
        min_size=1,
        max_size=7,
    ),
    st.sampled_from([(STOP,), (STOP, 0), ()]),
    st.sets(st.integers(0, 20)),
)
def test_batch_keeps_each_response_up_to_its_end(
    responses: list[list[int]], stops: tuple[int, ...], preemptions: set[int]
) -> None:
    """Rollout i draws responses[i]; rows that are free are taken by those that wait, and the
    youngest is preempted at some steps.
    """
    sampling = SamplingParams(
        temperature=1.0, max_new_tokens=NUM_STEPS, stop_token_ids=stops, presence_penalty=1.0
    )
    batch = RolloutBatch(MAX_ROWS, sampling, STOP + 1, torch.device("cpu"))
    cache = DecodeCache(100, MAX_ROWS, 4)
    waiting = [(number, NO_IDS, NO_LOGPROBS) for number in range(len(responses))]
    found, step = {}, 0

    def draw(first: int) -> None:
        uniforms = batch.uniforms(first)
        drawn = []
        for row in range(first, len(batch)):
            number, length = batch.names[row][1], len(batch.response(row)[0])
            expected = stream(number).random(NUM_STEPS)[length]
            assert uniforms[row - first] == expected
            assert set(torch.nonzero(batch.seen(row)[0]).flatten().tolist()) == {
                max(token, 0) for token in responses[number][:length]
            }
            drawn.append(responses[number][length])
        tokens = torch.tensor(drawn)
        ended = batch.append(tokens, -tokens.float(), first)
        for row in ended:
            found[batch.names[row][1]] = batch.generation(row, stops)
        batch.release(ended, cache)

    while waiting or len(batch):
        first = len(batch)
        while waiting and len(batch) < MAX_ROWS:
            number, ids, logprobs = waiting.pop(0)
            bounds = torch.tensor([0, 2 + len(ids)], dtype=torch.int32)
            cache.begin(bounds, [Admission(number, 2)], torch.float32)
            batch.add((5, number), 100 * number, stream(number), ids, logprobs)
        if first < len(batch):
            draw(first)
        if step in preemptions and len(batch):
            row = batch.youngest()
            assert batch.names[row][1] == max(number for _, number in batch.names)
            waiting.insert(0, (batch.names[row][1], *batch.response(row)))
            batch.release(np.array([row]), cache)
        step += 1
        if len(batch):
            lengths = [len(batch.response(row)[0]) for row in range(len(batch))]
            numbers = [number for _, number in batch.names]
            positions = [
                100 * number + length - 1 for number, length in zip(numbers, lengths, strict=True)
            ]
            assert batch.positions().tolist() == [positions] * 3
            assert batch.last_tokens().tolist() == [
                responses[number][length - 1]
                for number, length in zip(numbers, lengths, strict=True)
            ]
            cache.extend(torch.device("cpu"))
            draw(0)
    for number, response in enumerate(responses):
        generation = found[number]
        ends = [index for index, token in enumerate(response) if token in (NO_TOKEN, *stops)]
        is_broken = bool(ends) and response[ends[0]] == NO_TOKEN
        length = NUM_STEPS if not ends else ends[0] if is_broken else ends[0] + 1
        assert generation.response_ids.tolist() == response[:length]
        assert generation.rollout_logprobs.tolist() == [-float(t) for t in response[:length]]
        assert generation.is_broken == is_broken
        assert generation.finish_reason == ("stop" if ends else "length")
        assert generation.num_sound_tokens == (length if is_broken else None)


def test_uniform_streams_follow_each_generator_across_blocks() -> None:
    streams = UniformStreams(3)
    expected = np.stack([stream(seed).random(3 * UNIFORM_BLOCK) for seed in range(3)])
    starts = np.array([0, UNIFORM_BLOCK, UNIFORM_BLOCK + 44])
    for seed, start in enumerate(starts):
        streams.add(stream(seed), int(start))
    for step in range(UNIFORM_BLOCK + 10):
        found = streams.numbers(0, starts + step).tolist()
        assert found == [expected[seed, start + step] for seed, start in enumerate(starts)]

"""Which rollouts join the batch: every one once, within rows, blocks and tokens."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_mm.experience import Prompt
from zppo_mm.models.layers.cache import Admission, DecodeCache
from zppo_mm.rollout.admission import NO_LOGPROBS, AdmissionQueue, Candidate
from zppo_mm.rollout.engine import GenerationRequest

SLOTS = 4


def request(length: int, num_rollouts: int, num_patches: int = 0) -> GenerationRequest:
    grids = ((1, 1, num_patches),) if num_patches else ()
    prompt = Prompt("", np.zeros(length, np.int64), np.zeros((3, length), np.int64), length, grids)
    return GenerationRequest(prompt, (), num_rollouts, ("x",))


def admit(cache: DecodeCache, requests: list[GenerationRequest], taken: list[Candidate]) -> None:
    lengths = [
        len(requests[each.request].prompt.token_ids) + len(each.response_ids) for each in taken
    ]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    admissions = [
        Admission(each.request, len(requests[each.request].prompt.token_ids), len(each.rollouts))
        for each in taken
    ]
    cache.begin(bounds, admissions, torch.float32)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9), st.integers(0, 20)), max_size=12),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 100),
    st.integers(16, 60),
    st.randoms(),
)
def test_every_rollout_is_taken_once_within_the_limits(
    sizes: list[tuple[int, int, int]],
    max_batch_size: int,
    max_patches: int,
    max_tokens: int,
    num_blocks: int,
    random: np.random.Generator,
) -> None:
    """Rows end or are preempted at random; what was preempted comes back before all others."""
    requests = [request(*size) for size in sizes]
    cache = DecodeCache(num_blocks, max_batch_size, SLOTS)
    queue = AdmissionQueue(requests, max_batch_size, max_tokens, max_patches)
    rows: list[tuple[int, int]] = []
    done: list[tuple[int, int]] = []
    while len(queue) or rows:
        taken = queue.take(cache)
        assert taken or rows
        tokens = [sizes[each.request][0] + len(each.response_ids) for each in taken]
        patches = [sizes[each.request][2] for each in taken]
        assert len(taken) <= 1 or (sum(tokens) <= max_tokens and sum(patches) <= max_patches)
        if taken:
            admit(cache, requests, taken)
        rows += [(each.request, rollout) for each in taken for rollout in each.rollouts]
        assert len(rows) <= max_batch_size
        assert cache.num_missing_blocks <= 0
        cache.extend(torch.device("cpu"))
        ended = sorted({random.randrange(len(rows)) for _ in range(1 + len(rows) // 3)})
        if len(rows) > 1 and random.random() < 0.3:
            # The youngest sits anywhere after moves; any row tests the queue as well.
            ended = ended[:1]
            ids = np.zeros(random.randrange(1, 9), np.int64)
            name = rows[ended[0]]
            queue.put_back(Candidate(name[0], (name[1],), ids, NO_LOGPROBS))
            assert len(queue)
        else:
            done += [rows[row] for row in ended]
        moves = cache.release(np.array(ended))
        for target, source in zip(moves.targets, moves.sources, strict=True):
            rows[target] = rows[source]
        del rows[len(rows) - len(ended) :]
        while cache.num_missing_blocks > 0:
            done.append(rows.pop())
            cache.release(np.array([len(rows)]))
    assert sorted(done) == [
        (index, rollout) for index, (_, count, _) in enumerate(sizes) for rollout in range(count)
    ]


def test_order_of_admission() -> None:
    """Longest prompts first, rollouts of one together, preempted ones before all."""
    requests = [request(3, 2), request(9, 2), request(5, 5)]
    queue = AdmissionQueue(requests, 4, 1000)
    cache = DecodeCache(100, 4, SLOTS)
    first = queue.take(cache)
    # The five rollouts of the second longest do not fit beside these two, not even four of them.
    assert [(each.request, each.rollouts) for each in first] == [(1, (0, 1))]
    admit(cache, requests, first)
    assert queue.take(cache) == []
    cache.release(np.array([0]))
    queue.put_back(Candidate(1, (0,), np.zeros(2, np.int64), NO_LOGPROBS))
    assert [(each.request, each.rollouts) for each in queue.take(cache)] == [(1, (0,))]
    cache.release(np.array([0]))
    assert [(each.request, each.rollouts) for each in queue.take(cache)] == [(2, (0, 1, 2, 3))]
    assert [(each.request, each.rollouts) for each in queue.take(cache)] == [(2, (4,)), (0, (0, 1))]
    assert len(queue) == 0


def test_a_prompt_s_rollouts_are_divided_where_the_cache_is_small() -> None:
    # A prompt of 9 tokens takes 3 of the 6 blocks: 3 rows can go on.
    requests = [request(9, 8)]
    queue = AdmissionQueue(requests, 8, 1000)
    cache = DecodeCache(6, 8, SLOTS)
    taken = queue.take(cache)
    assert [(each.request, each.rollouts) for each in taken] == [(0, (0, 1, 2))]
    admit(cache, requests, taken)
    assert queue.take(cache) == []
    assert cache.num_missing_blocks == 0

"""Decoding's attention to blocks, against plain attention over each sequence's own tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zppo_mm.models.layers import paged_attention
from zppo_mm.models.layers.cache import Admission, DecodeCache
from zppo_mm.models.layers.paged_attention import attend, read, read_plainly

GROUPS, HEADS, DIM, SLOTS = 2, 3, 16, 8
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
SUM_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-4}
CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("prompts", "num_steps"),
    [
        ({"a": (9, 3), "b": (9, 3)}, 4),
        ({"a": (4, 3), "b": (33, 2)}, 20),
        ({"a": (1, 1), "b": (50, 4), "c": (8, 2)}, 17),
        ({"a": (6, 1), "b": (2, 1)}, 1),
    ],
    ids=["equal", "lengths differ", "uneven groups", "nothing shared"],
)
def test_each_sequence_sees_its_prompt_and_its_own_tokens(
    dtype: torch.dtype, prompts: dict[str, tuple[int, int]], num_steps: int
) -> None:
    """Some sequences leave half way; one prompt comes then, with a resumed sequence."""
    torch.manual_seed(0)
    cache = DecodeCache(40, 12, SLOTS)
    rows: list[list[torch.Tensor]] = []

    def fill(name: str, num_prompt: int, num_own: int, num_rows: int) -> None:
        pair = random(2, num_prompt + num_own, GROUPS, DIM, dtype=dtype)
        bounds = torch.tensor([0, num_prompt + num_own], dtype=torch.int32)
        cache.begin(bounds, [Admission(name, num_prompt, num_rows)], dtype)
        cache.store_attention(0, *pair)
        rows.extend([pair] for _ in range(num_rows))

    for name, (length, count) in prompts.items():
        fill(name, length, 0, count)
    for step in range(num_steps):
        if step == num_steps // 2:
            gone = np.arange(0, len(rows), 2)
            moves = cache.release(gone)
            for target, source in zip(moves.targets, moves.sources, strict=True):
                rows[target] = rows[source]
            del rows[len(rows) - len(gone) :]
            fill("late", 11, 9, 1)
        cache.extend(CPU)
        new = random(2, len(rows), GROUPS, DIM, dtype=dtype)
        blocks, slots = cache.tail
        for held, newest in zip(cache.attention[0], new, strict=True):
            held[blocks, :, slots] = newest
        for row, parts in enumerate(rows):
            parts.append(new[:, row : row + 1])
        queries = 3 * random(len(rows), GROUPS, HEADS, DIM).to(dtype)
        found = attend(queries, *cache.attention[0], cache.empty, cache.reads)
        assert found.dtype == dtype
        for row, parts in enumerate(rows):
            keys, values = (tokens.transpose(0, 1) for tokens in torch.cat(parts, 1).double())
            scores = queries[row].double() @ keys.transpose(1, 2) / math.sqrt(DIM)
            assert (scores.softmax(-1) @ values - found[row]).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("function", [read, read_plainly])
def test_reads_come_with_the_sum_of_their_exponentials(
    function: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two of the three blocks at once.
    monkeypatch.setattr(paged_attention, "MAX_READ_ELEMENTS", 2 * 2 * GROUPS * 21 * DIM)
    torch.manual_seed(1)
    queries = random(3, GROUPS, HEADS, DIM, dtype=dtype)
    keys, values = (random(3, GROUPS, 21, DIM, dtype=dtype) for _ in range(2))
    empty = torch.zeros(3, 21, dtype=dtype)
    empty[1, 8:] = float("-inf")
    assert callable(function)
    output, sums = function(queries, keys, values, empty)
    scores = queries.double() @ keys.double().transpose(-1, -2) / math.sqrt(DIM)
    scores += empty.double()[:, None, None]
    assert output.dtype == dtype
    assert sums.dtype == torch.float32
    assert (scores.logsumexp(-1) - sums).abs().max() <= SUM_TOLERANCE[dtype]
    assert (scores.softmax(-1) @ values.double() - output).abs().max() <= TOLERANCE[dtype]


def test_a_broken_sequence_leaves_the_others_alone() -> None:
    """Blocks that held NaN are used again, and what fills up a read is never another's."""
    cache = DecodeCache(10, 4, SLOTS)
    for name, value in (("broken", math.nan), ("sound", 1.0)):
        pair = torch.full((2, 5, GROUPS, DIM), value)
        bounds = torch.tensor([0, 5], dtype=torch.int32)
        cache.begin(bounds, [Admission(name, 5, 2)], torch.float32)
        cache.store_attention(0, *pair)
    for step in range(2 * SLOTS + 1):
        if step == SLOTS + 2:
            moves = cache.release(np.array([0, 1]))
            assert moves.targets.tolist() == [0, 1]
        cache.extend(CPU)
        blocks, slots = cache.tail
        new = torch.ones(cache.batch_size, GROUPS, DIM)
        if step < SLOTS + 2:
            new[:2] = math.nan
        for held in cache.attention[0]:
            held[blocks, :, slots] = new
        queries = torch.ones(cache.batch_size, GROUPS, HEADS, DIM)
        found = attend(queries, *cache.attention[0], cache.empty, cache.reads)
        assert (found[-2:] == 1).all()

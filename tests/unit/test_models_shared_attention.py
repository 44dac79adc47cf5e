"""Decoding's attention to shared prompts, against plain attention over each sequence's own copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from zppo_mm.models.layers.shared_attention import PromptGroups, attend, softmax_read

KEY_GROUPS, HEADS, DIM = 2, 3, 16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
SUM_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-4}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("owners", "lengths"),
    [
        ([0, 0, 0, 1, 1, 1], [9, 9]),
        ([0, 0, 0, 1, 1, 1], [4, 33]),
        ([2, 0, 2, 1, 2, 0], [1, 50, 7]),
        ([1, 0], [6, 2]),
        ([0], [5]),
    ],
    ids=["equal", "lengths differ", "uneven groups in any order", "nothing shared", "one"],
)
def test_each_sequence_sees_its_prompt_and_its_own_tokens(
    dtype: torch.dtype, owners: Sequence[int], lengths: list[int]
) -> None:
    torch.manual_seed(0)
    batch, num_own = len(owners), 4
    queries = 3 * random(batch, KEY_GROUPS, HEADS, DIM)
    keys, values = (
        random(len(lengths), KEY_GROUPS, max(lengths), DIM, dtype=dtype) for _ in range(2)
    )
    own_keys, own_values = (random(batch, KEY_GROUPS, num_own, DIM, dtype=dtype) for _ in range(2))
    prompts = PromptGroups.build(owners, lengths, torch.device("cpu"), dtype)
    found = attend(queries.to(dtype), (keys, values), (own_keys, own_values), prompts)
    assert found.dtype == dtype
    for row, owner in enumerate(owners):
        used = lengths[owner]
        all_keys = torch.cat([keys[owner, :, -used:], own_keys[row]], 1).double()
        all_values = torch.cat([values[owner, :, -used:], own_values[row]], 1).double()
        scores = queries[row].to(dtype).double() @ all_keys.transpose(1, 2) / math.sqrt(DIM)
        assert (scores.softmax(-1) @ all_values - found[row]).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
def test_reads_come_with_the_sum_of_their_exponentials(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(1)
    queries = random(3, KEY_GROUPS, HEADS, DIM, dtype=dtype)
    keys, values = (random(3, KEY_GROUPS, 21, DIM, dtype=dtype) for _ in range(2))
    mask = torch.zeros(3, 1, 1, 21, dtype=dtype)
    mask[1, ..., :8] = float("-inf")
    output, sums = softmax_read(queries, keys, values, mask if masked else None)
    scores = queries.double() @ keys.double().transpose(-1, -2) / math.sqrt(DIM) + (
        mask.double() if masked else 0
    )
    assert sums.dtype == torch.float32
    assert (scores.logsumexp(-1) - sums).abs().max() <= SUM_TOLERANCE[dtype]
    assert (scores.softmax(-1) @ values.double() - output).abs().max() <= TOLERANCE[dtype]

"""The divergence over a vocabulary that is divided between ranks equals that over the whole."""

from __future__ import annotations

import os

import torch

from tests.support.launch import run_ranks
from zppo_mm.algorithms.divergence import jensen_shannon, top_jensen_shannon, top_tokens
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel

# Float32 sums over the vocabulary in another order.
TOLERANCE = 1e-5
TOP_K = 6


def divided_vocabulary(student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    """Return value, gradient, entropy and agreement of this rank's slice of the vocabulary, whole
    and with the rest as one outcome.
    """
    parallel.initialize(
        ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"])), seed=0
    )
    group, size, rank = parallel.tensor_group(), parallel.tensor_size(), parallel.tensor_rank()
    mine, other = (logits.chunk(size, -1)[rank].clone() for logits in (student, teacher))
    found = []
    top = top_tokens(other, TOP_K, group, 0.7)
    for divergence in (
        lambda logits: jensen_shannon(logits, other, group, 0.7, chunk_rows=3),
        lambda logits: top_jensen_shannon(logits, top, group, 0.7, chunk_rows=3),
    ):
        logits = mine.clone().requires_grad_()
        value = divergence(logits)
        (value.jsd * torch.arange(1.0, 9.0)).sum().backward()
        assert logits.grad is not None
        found += [value.jsd.detach(), value.entropies, value.agreements, logits.grad]
    parallel.shutdown()
    return [top.ids, top.logprobs, *found]


def test_a_divided_vocabulary_gives_the_same_divergence_and_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = 3 * torch.randn(2, 8, 32, generator=generator)
    teacher[0] = student[0]
    # Ties across the two slices: the first of equals counts on both sides.
    student[1], teacher[1] = 0.0, 0.0
    (alone,) = run_ranks(divided_vocabulary, 1, student, teacher)
    ranks = run_ranks(divided_vocabulary, 2, student, teacher)
    for index, expected in enumerate(alone):
        parts = [rank[index] for rank in ranks]
        if expected.shape == student.shape:
            torch.testing.assert_close(torch.cat(parts, -1), expected, atol=TOLERANCE, rtol=0)
            continue
        for part in parts:
            # Which of equal tokens are among the top ones is open.
            rows = slice(None) if part.is_floating_point() else [0, *range(2, 8)]
            torch.testing.assert_close(part[rows], expected[rows], atol=TOLERANCE, rtol=0)
    assert alone[4].tolist()[:2] == [1.0, 1.0]

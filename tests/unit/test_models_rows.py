"""Logits of some tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import network_checks, tiny_qwen
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel

# The same float32 products, in matrices of another height.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shutdown()


@torch.no_grad()
def test_the_logits_of_some_rows_are_rows_of_all_logits(tmp_path: Path) -> None:
    oracle = tiny_qwen.text_model()
    network = network_checks.build(tiny_qwen.save(oracle, tmp_path), ParallelConfig())
    token_ids = torch.arange(3, 12)
    inputs = (token_ids, torch.arange(9).expand(3, -1), torch.tensor([0, 9], dtype=torch.int32))
    rows = torch.tensor([1, 2, 7])
    torch.testing.assert_close(
        network(*inputs, rows=rows), network(*inputs)[rows], atol=TOLERANCE, rtol=TOLERANCE
    )

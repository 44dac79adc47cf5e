"""What the gate compares, for every family: the source checkpoint's log-probs are the network's,
and no medium is miscounted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.processor import VisionInput
from tests.support import network_checks, tiny_families, tiny_qwen
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.parity.media import media_in_prompt, num_features
from zppo_mm.parity.oracle import SourceInput, source_logprobs

# Float32 sums in another order, on logits of scale 3.
MAX_DIFFERENCE = 1e-4
NUM_RESPONSE_TOKENS = 2  # every sequence ends with as many text tokens
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shutdown()


def vision(part: tiny_qwen.Sequence) -> tuple[VisionInput, ...]:
    pieces = part.patches.split([t * h * w for t, h, w in part.grids])
    return tuple(
        VisionInput(kind, piece.numpy(), grid)
        for kind, piece, grid in zip(part.kinds, pieces, part.grids, strict=True)
    )


@pytest.mark.parametrize("family", tiny_families.KINDS)
@pytest.mark.medium
def test_the_source_checkpoint_gives_the_networks_logprobs(family: str, tmp_path: Path) -> None:
    folder, _ = tiny_families.folder(family, tmp_path / "model")
    network = network_checks.build(folder, ParallelConfig())
    parts = [
        part
        for kind in tiny_families.KINDS[family]
        for part in tiny_families.sequences(family, kind)
    ]
    inputs = [
        SourceInput(
            part.token_ids.numpy(), part.positions.numpy(), NUM_RESPONSE_TOKENS, vision(part)
        )
        for part in parts
    ]
    options = {"dtype": torch.float32, "temperature": TEMPERATURE, "device": torch.device("cpu")}
    found = source_logprobs(folder, inputs, max_seconds=1000.0, **options)
    assert found.skipped == ""
    for part, item, logprobs in zip(parts, inputs, found.logprobs, strict=True):
        with torch.no_grad():
            logits = network(**tiny_qwen.pack([part]))
        rows = (logits / TEMPERATURE).log_softmax(-1)[-NUM_RESPONSE_TOKENS - 1 : -1]
        wanted = rows.gather(1, part.token_ids[-NUM_RESPONSE_TOKENS:, None]).squeeze(1)
        assert np.abs(logprobs - wanted.numpy()).max() <= MAX_DIFFERENCE, part.kinds
        tokens = (tiny_qwen.IMAGE, tiny_qwen.VIDEO)
        assert media_in_prompt(
            item.token_ids, part.kinds, part.grids, *tokens, tiny_qwen.MERGE
        ) == len(part.grids)
        assert num_features(network, item.vision) == np.isin(item.token_ids, tokens).sum()

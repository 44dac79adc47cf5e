"""Distillation that averages over questions does the same on any layout in bfloat16 too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.distillation_example import TOP_K, TWO_RANKS, Distilled, distil, make_folders
from tests.support.launch import run_ranks
from tests.support.training_example import Result

# bfloat16 rounds every activation to 8 bits, in another order where sequences are packed otherwise.
BFLOAT16_TOLERANCE = 2e-2
# The same, against a network in float32.
PRECISION_TOLERANCE = 5e-2

LAYOUTS = {name: TWO_RANKS[name] for name in ("data 2", "tensor 2", "context 2")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("models"))


def first_updates(result: Result) -> list[tuple[float, float]]:
    return [(update.loss, update.grad_norm) for update in result.metrics[0].updates[:1]]


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_in_bfloat16_the_layout_does_not_matter(folders: Path, top_k: int) -> None:
    way = Distilled(top_k=top_k, by_question=True, params_dtype="bfloat16")
    alone = [
        way,
        dataclasses.replace(way, micro_batch_tokens=20, share_prompts=True),
        dataclasses.replace(way, params_dtype="float32"),
        dataclasses.replace(way, by_question=False),
    ]
    reference, small, precise, by_token = map(
        first_updates, run_ranks(distil, 1, folders, alone)[0]
    )
    assert small == [pytest.approx(each, rel=BFLOAT16_TOLERANCE) for each in reference]
    assert precise == [pytest.approx(each, rel=PRECISION_TOLERANCE) for each in reference]
    # The mean over tokens is another number, by more than rounding.
    assert by_token != [pytest.approx(each, rel=PRECISION_TOLERANCE) for each in reference]
    ways = [dataclasses.replace(way, layout=layout) for layout in LAYOUTS.values()]
    for results in run_ranks(distil, 2, folders, ways):
        for name, actual in zip(LAYOUTS, results, strict=True):
            assert first_updates(actual) == [
                pytest.approx(each, rel=BFLOAT16_TOLERANCE) for each in reference
            ], name

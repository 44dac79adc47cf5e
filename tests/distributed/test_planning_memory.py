"""The planner's memory of a tensor-parallel rank beside what torch holds there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.kept_tensors import kept_by_backward, size_of
from tests.support.launch import run_ranks
from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.families.architecture import Architecture, parse_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups
from zppo_mm.planning.activations import Precision
from zppo_mm.planning.memory import activations, rank_parameters
from zppo_mm.weights.initial_weights import initialize_weights

# Indices, statistics of the norms and the remainder of the last chunk are left out.
TOLERANCE = 0.05
TOKENS = 256
LAYOUTS = (
    ParallelConfig(tensor_model_parallel_size=2),
    ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
)


def architecture() -> Architecture:
    raw = PUBLISHED["Qwen3.5-0.8B"][0]
    sizes = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 640}
    text = {**raw["text_config"], "vocab_size": 4096, **sizes}
    ids = {key: 4090 + number for number, key in enumerate(k for k in raw if k.endswith("_id"))}
    vision = {**raw["vision_config"], "out_hidden_size": 256}
    found = parse_architecture({**raw, "text_config": text, "vision_config": vision, **ids})
    return replace(found, vision=None, vision_prefix="")


def held(index: int) -> tuple[int, int]:
    """Return bytes of the weights, and of what autograd keeps, on a rank of a layout."""
    layout = LAYOUTS[index]
    groups.initialize(layout, seed=0)
    options = ModelConfig(transformer_impl="local", params_dtype="bfloat16")
    model = build_model(architecture(), options, layout)
    initialize_weights(model, 0)
    model.train()
    found = size_of(model.parameters()), kept_by_backward(model, TOKENS)
    groups.shutdown()
    return found


@pytest.mark.parametrize("index", range(len(LAYOUTS)))
def test_a_tensor_rank_holds_what_is_counted(index: int) -> None:
    groups.initialize(ParallelConfig(), seed=0)
    (split,) = (
        each for each in rank_parameters(architecture()) if (each.tensor, each.pipeline) == (2, 1)
    )
    groups.shutdown()
    counted = activations(architecture(), LAYOUTS[index], "none", TOKENS, Precision(on_gpu=False))
    for weights, kept in run_ranks(held, 2, index):
        assert 2 * split.num_parameters == pytest.approx(weights, rel=TOLERANCE)
        assert counted == pytest.approx(kept, rel=TOLERANCE)

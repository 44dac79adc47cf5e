"""The planner's memory beside what torch holds: parameters, gradient buffers, optimizer state
and tensors that autograd keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.kept_tensors import kept_by_backward, size_of
from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import AlgorithmConfig, ParallelConfig, RunConfig
from zppo_mm.models.families.architecture import Architecture, parse_architecture
from zppo_mm.models.layers import delta_rule
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups
from zppo_mm.planning.activations import Precision, layer_bytes
from zppo_mm.planning.memory import activations, cache_bytes, estimate_memory
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights.initial_weights import initialize_weights

# Indices, statistics of the norms and the remainder of the last chunk are left out.
TOLERANCE = 0.05
BYTES = {"bfloat16": 2, "float32": 4}
TOKENS = 256


def small(name: str, **sizes: Any) -> Architecture:
    """Return a published network with fewer layers, a smaller vocabulary and no tower."""
    raw = PUBLISHED[name][0]
    text = {**raw.get("text_config", raw), "vocab_size": 4096, **sizes}
    if "text_config" not in raw:
        return parse_architecture(text)
    ids = {key: 4090 + number for number, key in enumerate(k for k in raw if k.endswith("_id"))}
    vision = {**raw["vision_config"], "out_hidden_size": text["hidden_size"]}
    found = parse_architecture({**raw, "text_config": text, "vision_config": vision, **ids})
    return replace(found, vision=None, vision_prefix="")


NETWORKS = {
    "delta": small("Qwen3.5-0.8B", num_hidden_layers=4, hidden_size=256, intermediate_size=640),
    "more value heads": small(
        "Qwen3.5-4B", num_hidden_layers=4, hidden_size=320, intermediate_size=512
    ),
    "attention": small("Qwen3-0.6B", num_hidden_layers=3, hidden_size=256, intermediate_size=896),
}


def run_config(recompute: str, dtype: str) -> RunConfig:
    return load_config(
        None, ["method=grpo", f"model.recompute={recompute}", f"model.params_dtype={dtype}"]
    )


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=0)
    yield
    groups.shutdown()


def build(architecture: Architecture, config: RunConfig) -> Any:
    options = replace(config.model, transformer_impl="local")
    model = build_model(architecture, options, ParallelConfig())
    initialize_weights(model, 0)
    model.train()
    return model


def inside_of_a_layer(architecture: Architecture, tokens: int, precision: Precision) -> int:
    """Return what the largest layer keeps."""
    layout = ParallelConfig()
    kinds = {*architecture.layer_types}
    return int(tokens * max(layer_bytes(architecture, kind, layout, precision) for kind in kinds))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", list(BYTES))
@pytest.mark.parametrize("name", list(NETWORKS))
def test_activations_are_what_autograd_keeps(name: str, dtype: str, recompute: str) -> None:
    architecture, config = NETWORKS[name], run_config(recompute, dtype)
    model = build(architecture, config)
    held = kept_by_backward(model, TOKENS)
    counted = activations(
        architecture, config.parallel, recompute, TOKENS, Precision(BYTES[dtype], on_gpu=False)
    )
    if recompute == "full":
        # The inside of one layer is there while it is computed again, after the forward pass.
        counted -= inside_of_a_layer(architecture, TOKENS, Precision(BYTES[dtype], on_gpu=False))
    assert counted == pytest.approx(held, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", list(BYTES))
def test_weights_gradients_and_optimizer_are_those_of_a_policy(dtype: str) -> None:
    architecture, config = NETWORKS["delta"], run_config("none", dtype)
    model = build(architecture, config)
    objective = PolicyObjective(AlgorithmConfig(), 1.0, groups.tensor_group())
    policy = Policy(model, config.train, ParallelConfig(), objective)
    optimizer = policy.optimizer
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
    counted = estimate_memory(
        architecture, config, 1, precision=Precision(BYTES[dtype], on_gpu=False)
    )
    buffers = [each.grad_data for each in policy._wrapped.buffers]
    state, copies = [], []
    for part in optimizer.chained_optimizers:
        for parameter, values in part.optimizer.state.items():
            copies.append(parameter)
            state += [value for value in values.values() if value.dim()]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    state += [copy for copy in copies if copy.untyped_storage().data_ptr() not in own]
    assert counted.weights == pytest.approx(size_of(model.parameters()), rel=TOLERANCE)
    assert counted.gradients == pytest.approx(size_of(buffers), rel=TOLERANCE)
    assert counted.optimizer == pytest.approx(size_of(state), rel=TOLERANCE)


def test_a_hundred_million_parameters() -> None:
    check_a_hundred_million_parameters(on_gpu=False)


def test_a_hundred_million_parameters_as_a_gpu_computes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delta_rule, "scan_in_turn", delta_rule.scan_by_transitions)
    monkeypatch.setattr(delta_rule, "MAX_CHUNK_TOKENS_CPU", delta_rule.MAX_CHUNK_TOKENS_GPU)
    check_a_hundred_million_parameters(on_gpu=True)


def check_a_hundred_million_parameters(on_gpu: bool) -> None:
    """Compare what is counted with what autograd keeps."""
    architecture = small(
        "Qwen3.5-0.8B", num_hidden_layers=8, hidden_size=768, intermediate_size=2048
    )
    config = run_config("none", "bfloat16")
    model = build(architecture, config)
    assert 0.9e8 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e8
    counted = activations(architecture, config.parallel, "none", TOKENS, Precision(on_gpu=on_gpu))
    assert counted == pytest.approx(kept_by_backward(model, TOKENS), rel=TOLERANCE)


def test_more_of_anything_never_takes_less() -> None:
    architecture, precision = NETWORKS["delta"], Precision()
    for recompute in ("none", "full"):
        sizes = [
            activations(architecture, ParallelConfig(), recompute, tokens, precision)
            for tokens in (1, 2, 100, 1000, 1001)
        ]
        assert sizes == sorted(sizes)
        assert sizes[0] > 0
    caches = [
        cache_bytes(architecture, load_config(None, [f"rollout.max_batch_size={rows}"]), precision)
        for rows in (1, 2, 100)
    ]
    assert caches == sorted(caches)
    split = [
        activations(
            architecture,
            ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1),
            "none",
            1000,
            precision,
        )
        for tensor in (1, 2)
    ]
    assert split[1] == pytest.approx(split[0] / 2, rel=0.01)

"""Every published size on the meta device: every parameter maps, shapes agree at every tensor size
that is legal, the count is right.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.published_sizes import PUBLISHED
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import check_layout, parse_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel import megatron_cpu
from zppo_mm.weights.mapping import known_language_keys, parameter_mappings, split_tensors

TENSOR_SIZES = (1, 2, 4, 8)
# Of those tried; bounded by the numbers of KV heads and linear key heads.
LARGEST = {"Qwen3.5-0.8B": 2, "Qwen3.5-2B": 2, "Qwen3.5-4B": 4, "Qwen3.5-9B": 4, "Qwen3.5-27B": 4}
LARGEST |= {"Qwen2.5-VL-3B": 2, "Qwen2.5-VL-7B": 4, "SmolLM2-135M": 1}


@contextmanager
def pretended_ranks(size: int) -> Iterator[ParallelConfig]:
    """Be tensor rank 0 of so many ranks that do not exist: groups have the size, collectives do
    nothing.
    """
    megatron_cpu.install()
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=size, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    try:
        yield ParallelConfig(tensor_model_parallel_size=size)
    finally:
        parallel.shutdown()


@functools.cache
def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of transformers' parameters."""
    raw, _count = PUBLISHED[name]
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    auto: Any = (
        transformers.AutoModelForImageTextToText
        if "vision_config" in raw
        else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        model = auto.from_config(config)
    return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.medium
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    _raw, published = PUBLISHED[name]
    count = sum(torch.Size(shape).numel() for shape in published_shapes(name).values()) / 1e9
    assert f"{count:.{len(published.partition('.')[2])}f}" == published


@pytest.mark.parametrize("size", TENSOR_SIZES)
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.medium
def test_every_parameter_maps_at_every_legal_tensor_size(name: str, size: int) -> None:
    architecture = parse_architecture(PUBLISHED[name][0])
    if size > LARGEST.get(name, 8):
        with pytest.raises(ModelError, match=r"cannot be split.*at most \d here"):
            check_layout(architecture, ParallelConfig(tensor_model_parallel_size=size))
        return
    wanted = published_shapes(name)
    found: dict[str, tuple[int, ...]] = {}
    with pretended_ranks(size) as layout:
        with torch.device("meta"):
            network = build_model(
                architecture, ModelConfig(transformer_impl="local", params_dtype="bfloat16"), layout
            )
        for mapping in parameter_mappings(network):
            whole = list(mapping.parameter.shape)
            if mapping.rule.axis is not None:
                whole[mapping.rule.axis] *= size
            parts = split_tensors(torch.empty(whole, device="meta"), mapping.rule, architecture)
            for key, part in zip(mapping.keys, parts, strict=True):
                assert key not in found, f"{key} is mapped twice"
                found[key] = tuple(part.shape)
    assert found == wanted
    tower = architecture.vision_prefix or "no tower"
    assert known_language_keys(architecture) == {key for key in wanted if not key.startswith(tower)}

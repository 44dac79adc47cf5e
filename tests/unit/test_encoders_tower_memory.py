"""What the vision tower keeps for its backward pass: counted, measured, and given up by
recomputation or a frozen tower.
"""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import pytest
import torch

from encoders.tower import VisionTower
from encoders.tower_memory import tower_activations
from tests.support import tiny_families
from tests.support.published_sizes import PUBLISHED

FAMILIES = ("qwen3_5", "qwen3_vl", "qwen2_5_vl")
GRIDS = torch.tensor([[1, 4, 6], [3, 4, 4], [2, 6, 2]])
# Left out of the count: indices, statistics of the norms.
COUNT_TOLERANCE = 0.005


@cache
def oracle_of(family: str) -> Any:
    """Return transformers' random tower of a family, in which every weight matters."""
    return tiny_families.model(family).model.visual


def tiny_tower(family: str, dtype: torch.dtype, recompute: bool) -> tuple[VisionTower, Any]:
    """Return a tower with the oracle's weights, and its config."""
    oracle = oracle_of(family)
    tower = VisionTower(family, oracle.config.to_dict(), dtype, recompute=recompute)
    tower.model.load_state_dict(oracle.state_dict())
    return tower, oracle.config


def random_patches(config: Any, grids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    elements = config.in_channels * config.temporal_patch_size * config.patch_size**2
    torch.manual_seed(1)
    return torch.randn(int(grids.prod(1).sum()), elements).to(dtype)


def kept_bytes(
    tower: VisionTower, patches: torch.Tensor, grids: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Return features, and the bytes of all tensors that their graph holds beside parameters."""
    kept: dict[int, weakref.ref[torch.Tensor]] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # As an object of its own that dies with the node of the graph.
        tensor = tensor.view_as(tensor)
        kept[id(tensor)] = weakref.ref(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = tower(patches, grids)
    gc.collect()
    alive = [tensor.untyped_storage() for held in kept.values() if (tensor := held()) is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    return features, sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_keeps_less_and_gives_the_same_bits(family: str, dtype: torch.dtype) -> None:
    found = []
    for recompute in (False, True):
        tower, config = tiny_tower(family, dtype, recompute)
        features, kept = kept_bytes(tower, random_patches(config, GRIDS, dtype), GRIDS)
        torch.manual_seed(2)
        (features * torch.randn_like(features)).sum().backward()
        found.append((features, kept, [parameter.grad for parameter in tower.parameters()]))
    (plain, much, gradients), (again, little, recomputed) = found
    assert torch.equal(plain, again)
    assert little < 0.4 * much
    for one, other in zip(gradients, recomputed, strict=True):
        assert one.any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_keeps_nothing(family: str, recompute: bool) -> None:
    tower, config = tiny_tower(family, torch.float32, recompute)
    patches = random_patches(config, GRIDS, torch.float32)
    wanted = tower(patches, GRIDS).detach()
    tower.requires_grad_(False)
    features, kept = kept_bytes(tower, patches, GRIDS)
    assert (features.requires_grad, kept) == (False, 0)
    assert torch.equal(features, wanted)
    # The mergers alone: less than the blocks' inputs.
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("merger" in name)
    features, kept = kept_bytes(tower, patches, GRIDS)
    assert features.requires_grad
    mergers = tower.num_levels
    assert kept < (4 * mergers + 1) * 4 * config.hidden_size * len(patches)


@pytest.mark.parametrize("name", ["Qwen3.5-9B", "Qwen3-VL-2B", "Qwen2.5-VL-3B"])
def test_the_count_is_what_torch_keeps_at_published_widths(name: str) -> None:
    raw, _ = PUBLISHED[name]
    vision = {**raw["vision_config"], "depth": 2}
    if vision.get("deepstack_visual_indexes"):
        vision["deepstack_visual_indexes"] = [0]
    grids = torch.tensor([[1, 8, 8]])
    counted = tower_activations(raw["model_type"], vision)
    assert counted.depth == 2
    tower = VisionTower(raw["model_type"], vision, torch.bfloat16, recompute=True)
    config = tower.model.config
    patches = random_patches(config, grids, torch.bfloat16)
    for recompute in (False, True):
        # Nothing is recomputed outside training mode.
        _, kept = kept_bytes(tower.train(recompute), patches, grids)
        # Recomputation holds the rotary tables without saving them, and the inside of a block only
        # in the backward pass.
        head = config.hidden_size // config.num_heads
        unseen = 8 * head + counted.block if recompute else 0
        assert kept / 64 == pytest.approx(counted.peak(recompute) - unseen, rel=COUNT_TOLERANCE)


def test_a_video_of_4096_tokens_by_hand() -> None:
    raw, _ = PUBLISHED["Qwen3.5-9B"]
    counted = tower_activations("qwen3_5", raw["vision_config"])
    # In bfloat16 11 vectors of 1,152 and 2 of 4,304, in float32 the denominators of 16 heads.
    assert counted.block == 2 * (11 * 1152 + 2 * 4304) + 4 * 16 == 42_624
    assert counted.block_input == 2 * 1152
    # Pixels of 16 x 16 x 2 x 3, 4 vectors of 1,152, in float32 two tables of 72.
    assert counted.rest == 2 * (1536 + 4 * 1152) + 2 * 4 * 72
    patches = 4 * 4096
    # 27 blocks: 18.9 GB, or their inputs and the inside of one with the rest: 1.9 GB.
    assert patches * 27 * counted.block == pytest.approx(18.86e9, rel=1e-3)
    assert patches * counted.peak(recompute=False) == pytest.approx(19.07e9, rel=1e-3)
    assert patches * counted.peak(recompute=True) == pytest.approx(1.93e9, rel=1e-2)

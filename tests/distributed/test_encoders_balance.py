"""A vision tower whose work is shared gives the features and gradients of one that computes
everything.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from encoders.tower import VisionTower
from tests.support import tiny_qwen
from tests.support.launch import run_ranks

TOLERANCE = 1e-5  # float32, the same sums in another order


def largest_difference(
    grids: list[list[int]], frozen: bool, recompute: bool
) -> tuple[float, float]:
    """Return how far features and gradients of the shared tower, perhaps with recomputed blocks,
    are from the replicated one's without.
    """
    torch.manual_seed(0)
    tower = VisionTower("qwen3_5", tiny_qwen.vision_config(), recompute=recompute)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(not (frozen and "merger" not in name))
    counts = torch.tensor(grids).prod(dim=1)
    patches = torch.randn(int(counts.sum()), 96)
    upstream = torch.randn(int(counts.sum()) // 4, 64)
    results = []
    for group in (None, dist.group.WORLD):
        tower.zero_grad()
        # Nothing is recomputed outside training mode.
        tower.train(group is not None)
        features = tower(patches, torch.tensor(grids), group)
        (features * upstream).sum().backward()
        results.append((features.detach(), [p.grad for p in tower.parameters() if p.requires_grad]))
    (features, gradients), (shared_features, shared_gradients) = results
    distances = [
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
        for a, b in zip(gradients, shared_gradients, strict=True)
    ]
    return float((features - shared_features).abs().max()), max(distances)


def compare_all() -> list[tuple[float, float]]:
    dist.init_process_group("gloo")
    cases = [
        ([[1, 4, 6], [3, 2, 4], [1, 2, 2]], False),
        ([[1, 4, 4]], False),
        ([[1, 4, 6], [2, 4, 4]], True),
    ]
    return [
        largest_difference(grids, frozen, recompute)
        for grids, frozen in cases
        for recompute in (False, True)
    ]


def test_shared_work_gives_the_same_features_and_gradients() -> None:
    # The second case has one medium for two ranks: the idle one takes part in every collective.
    for differences in run_ranks(compare_all, 2):
        assert max(max(pair) for pair in differences) < TOLERANCE

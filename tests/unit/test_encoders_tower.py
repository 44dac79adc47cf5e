"""Positions, fusion and the vision tower against transformers on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from encoders.balance import assign_media
from encoders.fusion import fuse
from encoders.positions import mrope_positions
from encoders.tower import VisionTower
from tests.support import tiny_qwen

IMAGE, VIDEO, START, END = 90, 91, 92, 93
PATCH_ELEMENTS = 3 * 2 * 4 * 4
# The same float32 sums in another grouping.
MAX_BATCHING_DIFFERENCE = 1e-6


@pytest.fixture(scope="module")
def oracle() -> Qwen3_5ForConditionalGeneration:
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
        },
    }
    config = Qwen3_5Config(
        text_config=text,
        vision_config=tiny_qwen.vision_config(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    torch.manual_seed(0)
    return Qwen3_5ForConditionalGeneration(config)


def image(h: int, w: int) -> list[int]:
    return [START, *[IMAGE] * (h * w // 4), END]


def video(t: int, h: int, w: int) -> list[int]:
    return [token for _ in range(t) for token in (7, 8, START, *[VIDEO] * (h * w // 4), END)]


CASES = {
    "text": ([1, 2, 3, 4], []),
    "image": ([1, 2, *image(4, 6), 3], [(1, 4, 6)]),
    "tall image": ([*image(8, 2), 3, 4], [(1, 8, 2)]),
    "video": ([1, *video(3, 4, 4), 5], [(3, 4, 4)]),
    "mixed": (
        [*image(4, 4), 1, *video(2, 2, 6), 3, *image(2, 2), 5],
        [(1, 4, 4), (2, 2, 6), (1, 2, 2)],
    ),
    "adjacent": (
        [*image(4, 4), *image(2, 4), *video(2, 4, 4), *video(1, 2, 2), 9],
        [(1, 4, 4), (1, 2, 4), (2, 4, 4), (1, 2, 2)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_positions_equal_transformers(oracle: Qwen3_5ForConditionalGeneration, name: str) -> None:
    ids, grids = CASES[name]
    token_ids = torch.tensor([ids])
    types = (token_ids == IMAGE).int() + 2 * (token_ids == VIDEO).int()
    by_type = {1: [], 2: []}
    for grid, kind in zip(grids, grid_kinds(ids, grids), strict=True):
        by_type[kind].append(grid)
    expected, delta = oracle.model.get_rope_index(
        token_ids,
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(by_type[1]) if by_type[1] else None,
        video_grid_thw=torch.tensor(by_type[2]) if by_type[2] else None,
    )
    positions, next_position = mrope_positions(np.array(ids), grids, IMAGE, VIDEO, 2)
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert next_position == int(delta) + len(ids)


def grid_kinds(ids: list[int], grids: list[tuple[int, int, int]]) -> list[int]:
    runs = [
        token
        for last, token in zip([0, *ids], ids, strict=False)
        if token in (IMAGE, VIDEO) and token != last
    ]
    kinds = []
    for grid in grids:
        kinds.append(1 if runs[0] == IMAGE else 2)
        del runs[: 1 if runs[0] == IMAGE else grid[0]]
    return kinds


def test_position_numbers_by_hand() -> None:
    # one text token at 0; an image of 2 x 3 merged patches from 1 on; the next text token at 1 +
    # max(2, 3) = 4
    positions, next_position = mrope_positions(
        np.array([5, *[IMAGE] * 6, 5]), [(1, 4, 6)], IMAGE, VIDEO, 2
    )
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert next_position == 5
    assert mrope_positions(np.array([], dtype=np.int64), [], IMAGE, VIDEO, 2)[1] == 0


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        (image(4, 4), [], "image placeholders at token 1 have no grid, got 0 grids"),
        ([1, 2], [(1, 4, 4)], "1 grids are left over"),
        (video(1, 4, 4), [(2, 4, 4)], "1 grids are left over"),
        (
            image(4, 4),
            [(1, 4, 6)],
            "run of image placeholders at token 1 does not fit its grid, got 4 tokens, expected 6",
        ),
        ([*video(1, 4, 4), *image(4, 4)], [(2, 4, 4), (1, 4, 4)], "inside a video, got 1 of its 2"),
    ],
)
def test_positions_refuse(ids: list[int], grids: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(np.array(ids), grids, IMAGE, VIDEO, 2)


def test_fuse_puts_features_in_order_and_keeps_gradients() -> None:
    ids = torch.tensor([1, IMAGE, 2, VIDEO, VIDEO])
    for shape in ((5, 3), (5, 1, 3)):
        embeddings = torch.randn(shape, requires_grad=True)
        features = torch.randn(3, 3, requires_grad=True)
        fused = fuse(embeddings, ids, features, IMAGE, VIDEO)
        assert fused.shape == shape
        assert torch.equal(fused.reshape(5, 3)[[1, 3, 4]], features)
        assert torch.equal(fused[[0, 2]], embeddings[[0, 2]])
        fused.sum().backward()
        assert embeddings.grad.reshape(5, 3).sum(1).tolist() == [3, 0, 3, 0, 0]
        assert features.grad.sum() == 9


def test_fuse_refuses_what_does_not_fit() -> None:
    ids = torch.tensor([1, IMAGE, VIDEO])
    with pytest.raises(ValueError, match="got 3 features, expected 2"):
        fuse(torch.zeros(3, 4), ids, torch.zeros(3, 4), IMAGE, VIDEO)
    with pytest.raises(ValueError, match="got hidden size 5, expected 4"):
        fuse(torch.zeros(3, 4), ids, torch.zeros(2, 5), IMAGE, VIDEO)


def test_tower_equals_transformers_and_stays_exact_in_bfloat16(
    oracle: Qwen3_5ForConditionalGeneration,
) -> None:
    tower = VisionTower("qwen3_5", tiny_qwen.vision_config())
    tower.model.load_state_dict(oracle.model.visual.state_dict())
    grids = torch.tensor([[1, 4, 6], [3, 2, 4]])
    patches = torch.randn(48, PATCH_ELEMENTS)
    features = tower(patches, grids)
    assert features.shape == (12, 1, 64)
    assert torch.equal(features[:, 0], oracle.model.visual(patches, grid_thw=grids).pooler_output)
    before = tower.model.rotary_pos_emb.inv_freq.clone()
    tower.bfloat16()
    assert tower.model.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert torch.equal(tower.model.rotary_pos_emb.inv_freq, before)
    assert tower(patches, grids).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="patches do not fit the grids, got 47, expected 48"):
        tower(patches[:47], grids)


def test_windows_stay_within_their_frame_and_medium() -> None:
    # Windows of 2 x 2 features; all but the last grid are cut into several.
    vision = {
        **tiny_qwen.vision_config(),
        "depth": 3,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    del vision["num_position_embeddings"]
    torch.manual_seed(0)
    tower = VisionTower("qwen2_5_vl", vision)
    grids = torch.tensor([[1, 4, 6], [3, 6, 4], [2, 2, 10], [1, 6, 6], [2, 4, 4]])
    patches = torch.randn(int(grids.prod(1).sum()), PATCH_ELEMENTS)
    together = tower(patches, grids)
    parts = patches.split(grids.prod(1).tolist())
    alone = [tower(part, grid[None]) for part, grid in zip(parts, grids, strict=True)]
    assert (together - torch.cat(alone)).abs().max() <= MAX_BATCHING_DIFFERENCE
    # A frame is not seen from another one of its video, but from elsewhere in itself.
    changed = parts[1].clone()
    changed[:4] += 1
    difference = (tower(changed, grids[1:2]) - alone[1]).abs().amax((1, 2))
    assert (difference[:6] > 1e-4).all()
    assert not difference[6:].any()
    # Without the block of whole frames a feature is seen from its window only: of 3 x 2 features
    # the first two rows.
    tower.model.fullatt_block_indexes = []
    seen = (tower(changed, grids[1:2]) - tower(parts[1], grids[1:2])).abs().amax((1, 2)) > 0
    assert seen[:6].tolist() == [True] * 4 + [False] * 2


def test_media_are_assigned_evenly_once() -> None:
    # largest first: 9 -> rank 0, 8 -> rank 1, 3 -> rank 1 (8 < 9), 2 -> rank 0 (9 < 11)
    assert assign_media([2, 9, 3, 8], 2) == [[0, 1], [2, 3]]
    assert assign_media([5], 3) == [[0], [], []]

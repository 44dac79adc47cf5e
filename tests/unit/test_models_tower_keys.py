"""Settings of a vision tower that are refused by name."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from tests.support.config_oracle import WITH_TOWER
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import parse_architecture

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "qwen3_vl",
            {"out_hidden_size": 32},
            "vision_config.out_hidden_size is not supported, got 32, expected 64",
        ),
        (
            "qwen2_5_vl",
            {"in_channels": 1},
            "vision_config.in_channels is not supported, got 1, expected 3",
        ),
        (
            "qwen3_vl",
            {"deepstack_visual_indexes": [0, 0]},
            r"deepstack_visual_indexes does not fit, got \[0, 0\], expected at most 4 different",
        ),
        (
            "qwen3_vl",
            {"deepstack_visual_indexes": [1, 3]},
            r"deepstack_visual_indexes does not fit, got \[1, 3\], .* blocks below 3",
        ),
        ("qwen3_5", {"depth": "two"}, r"transformers cannot read it, got Strict.*depth"),
    ],
)
def test_a_tower_that_does_not_fit_is_refused(
    raws: dict[str, dict[str, Any]], family: str, change: dict[str, Any], message: str
) -> None:
    raw = copy.deepcopy(raws[family])
    raw["vision_config"].update(change)
    with pytest.raises(ModelError, match=message):
        parse_architecture(raw)


@pytest.mark.parametrize("family", WITH_TOWER)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 10**9}, "vision_config.depth is no size, got 1000000000"),
        ({"num_heads": 0}, "vision_config.num_heads is no size, got 0"),
        ({"num_heads": 3}, "vision_config.num_heads is not supported, got 3"),
        ({"temporal_patch_size": [2]}, r"vision_config.temporal_patch_size is no size, got [2]"),
        (
            {"hidden_act": "__import__"},
            "vision_config.hidden_act is not supported, got '__import__'",
        ),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused_by_name(
    raws: dict[str, dict[str, Any]], family: str, change: dict[str, Any], message: str
) -> None:
    raw = copy.deepcopy(raws[family])
    raw["vision_config"] |= change
    with pytest.raises(ModelError, match=re.escape(message)):
        parse_architecture(raw)


@pytest.mark.parametrize("family", WITH_TOWER)
def test_media_of_two_kinds_have_tokens_of_their_own(
    raws: dict[str, dict[str, Any]], family: str
) -> None:
    raw = copy.deepcopy(raws[family])
    with pytest.raises(ModelError, match="two of the tokens that stand for media are the same"):
        parse_architecture({**raw, "video_token_id": raw["image_token_id"]})

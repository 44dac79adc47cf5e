"""The public config.json values of published models that decide their shapes, and how many
parameters their authors name.

Source: the config.json files and model cards of the Qwen and SmolLM2 repositories on the Hugging
Face hub.
"""

from __future__ import annotations

from typing import Any

from tests.support.tiny_qwen import rope_parameters

TOWER_SIZES = ("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size")
MEDIA_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _dense(
    hidden: int, layers: int, heads: int, groups: int, ffn: int, tied: bool, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        **others,
    }


def _tower(*sizes: int, **others: Any) -> dict[str, Any]:
    merging = {"spatial_merge_size": 2, "temporal_patch_size": 2}
    return {**dict(zip(TOWER_SIZES, sizes, strict=True)), **merging, **others}


def _composite(
    model_type: str, text: dict[str, Any], vision: dict[str, Any], media_ids: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **dict(zip(MEDIA_TOKENS, media_ids, strict=True)),
    }


def _qwen3(*sizes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3", **_dense(*sizes, head_dim=128, rope_theta=1e6)}


def _qwen3_5(*sizes: Any, value_heads: int, tower: tuple[int, int, int, int]) -> dict[str, Any]:
    rope = rope_parameters(1e7, 0.25, [11, 11, 10])
    text = _dense(*sizes, head_dim=256, rope_parameters=rope) | {
        "vocab_size": 248320,
        "full_attention_interval": 4,
    }
    text |= {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
    text |= {"linear_conv_kernel_dim": 4, "model_type": "qwen3_5_text"}
    vision = _tower(
        *tower,
        text["hidden_size"],
        patch_size=16,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[],
    )
    return _composite("qwen3_5", text, vision, (248056, 248057, 248053, 248054))


def _qwen3_vl(*sizes: Any, tower: tuple[int, int, int, int]) -> dict[str, Any]:
    scaling = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = _dense(
        *sizes, head_dim=128, rope_theta=5e6, rope_scaling=scaling, model_type="qwen3_vl_text"
    )
    vision = _tower(
        *tower,
        text["hidden_size"],
        patch_size=16,
        num_position_embeddings=2304,
        deepstack_visual_indexes=DEEPSTACK[tower],
    )
    return _composite("qwen3_vl", text, vision, (151655, 151656, 151652, 151653))


def _qwen2_5_vl(*sizes: Any, vocab: int, ffn: int) -> dict[str, Any]:
    scaling = {"type": "mrope", "mrope_section": [16, 24, 24]}
    text = _dense(*sizes, rope_theta=1e6, rope_scaling=scaling) | {
        "vocab_size": vocab,
        "use_sliding_window": False,
    }
    vision = _tower(
        32,
        1280,
        16,
        ffn,
        text["hidden_size"],
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    vision |= {"in_chans": 3, "tokens_per_second": 2}
    tokens = dict(zip(MEDIA_TOKENS, (151655, 151656, 151652, 151653), strict=True))
    return {"model_type": "qwen2_5_vl", **text, "vision_config": vision, **tokens}


SMALL, MEDIUM, LARGE = (12, 768, 12, 3072), (24, 1024, 16, 4096), (27, 1152, 16, 4304)
DEEPSTACK = {MEDIUM: [5, 11, 17], LARGE: [8, 16, 24]}
SMOLLM2 = {
    "model_type": "llama",
    **_dense(576, 30, 9, 3, 1536, True, rope_theta=1e5),
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
}

PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen3-0.6B": (_qwen3(1024, 28, 16, 8, 3072, True), "0.6"),
    "Qwen3-1.7B": (_qwen3(2048, 28, 16, 8, 6144, True), "1.7"),
    "Qwen3-4B": (_qwen3(2560, 36, 32, 8, 9728, True), "4.0"),
    "Qwen3-8B": (_qwen3(4096, 36, 32, 8, 12288, False), "8.2"),
    "Qwen3-14B": (_qwen3(5120, 40, 40, 8, 17408, False), "14.8"),
    "Qwen3-32B": (_qwen3(5120, 64, 64, 8, 25600, False), "32.8"),
    "Qwen3.5-0.8B": (_qwen3_5(1024, 24, 8, 2, 3584, True, value_heads=16, tower=SMALL), "0.853"),
    "Qwen3.5-2B": (_qwen3_5(2048, 24, 8, 2, 6144, True, value_heads=16, tower=MEDIUM), "2.213"),
    "Qwen3.5-4B": (_qwen3_5(2560, 32, 16, 4, 9216, True, value_heads=32, tower=MEDIUM), "4.539"),
    "Qwen3.5-9B": (_qwen3_5(4096, 32, 16, 4, 12288, False, value_heads=32, tower=LARGE), "9.410"),
    "Qwen3.5-27B": (_qwen3_5(5120, 64, 24, 4, 17408, False, value_heads=48, tower=LARGE), "27.357"),
    "Qwen3-VL-2B": (_qwen3_vl(2048, 28, 16, 8, 6144, True, tower=MEDIUM), "2.1"),
    "Qwen3-VL-4B": (_qwen3_vl(2560, 36, 32, 8, 9728, True, tower=MEDIUM), "4.4"),
    "Qwen3-VL-8B": (_qwen3_vl(4096, 36, 32, 8, 12288, False, tower=LARGE), "8.8"),
    "Qwen3-VL-32B": (_qwen3_vl(5120, 64, 64, 8, 25600, False, tower=LARGE), "33.4"),
    "Qwen2.5-VL-3B": (_qwen2_5_vl(2048, 36, 16, 2, 11008, True, vocab=151936, ffn=3420), "3.75"),
    "Qwen2.5-VL-7B": (_qwen2_5_vl(3584, 28, 28, 4, 18944, False, vocab=152064, ffn=3420), "8.29"),
    "Qwen2.5-VL-32B": (_qwen2_5_vl(5120, 64, 40, 8, 27648, False, vocab=152064, ffn=3456), "33.5"),
    "Qwen2.5-VL-72B": (_qwen2_5_vl(8192, 80, 64, 8, 29568, False, vocab=152064, ffn=3456), "73.4"),
    "SmolLM2-135M": (SMOLLM2, "0.135"),
}
"""By name: config.json, and the parameters in billions as published (of Qwen3.5 without the
multi-token-prediction head).
"""

"""Tiny random transformers models of every family: the oracles. Prompts and packing are those of
`tiny_qwen`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from encoders.config import VideoLayout
from tests.support import tiny_qwen

TEXT = ("text",)
ALL = tuple(tiny_qwen.SEQUENCES)
KINDS = {
    "qwen3_5": ALL,
    "qwen3_5_text": TEXT,
    "qwen3_vl": ALL,
    "qwen2_5_vl": ALL,
    "qwen3": TEXT,
    "llama": TEXT,
}
"""Modalities of the families, by `model_type`."""
MEDIA_TOKENS = {
    "image_token_id": tiny_qwen.IMAGE,
    "video_token_id": tiny_qwen.VIDEO,
    "vision_start_token_id": tiny_qwen.VISION_START,
    "vision_end_token_id": tiny_qwen.VISION_END,
}
ONE_RUN = VideoLayout(timestamped=False, tokens_per_second=2.0, limits_per_frame=True)
SECONDS_PER_PATCH = 1.25
"""Times two tokens a second is no whole number: the time axis reads 0, 2, 5, 7."""
ONE_RUN_SEQUENCES: dict[str, list[list[tiny_qwen.Part]]] = {
    "text": tiny_qwen.SEQUENCES["text"],
    "image": tiny_qwen.SEQUENCES["image"],
    "video": [[3, ("video", (4, 6, 4)), 6], [1, ("video", (1, 2, 4)), 2, ("video", (3, 4, 6)), 4]],
    "mixed": [
        [5, ("image", (1, 4, 6)), 3, ("video", (3, 6, 2)), 2],
        [40],
        [2, ("video", (2, 2, 2)), 1, ("image", (1, 2, 6)), 20],
    ],
}
"""Where the tower has windows of 2 x 2 features: most of these grids are larger."""
DENSE: dict[str, Any] = {
    "vocab_size": tiny_qwen.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def model(family: str, *, tied: bool = False, seed: int = 0) -> Any:
    """Return a random model in which every weight matters."""
    if family == "qwen3_5":
        return tiny_qwen.vision_language_model(tied=tied, seed=seed)
    if family == "qwen3_5_text":
        return tiny_qwen.text_model(tied=tied, seed=seed)
    torch.manual_seed(seed)
    return tiny_qwen.randomised(_BUILDERS[family](tied))


def folder(family: str, path: Path, *, tied: bool = False) -> tuple[Path, Any]:
    """Return a saved folder and its oracle."""
    oracle = model(family, tied=tied)
    return tiny_qwen.save(oracle, path), oracle


# The bounds of the RoPE scaling fall among the few frequencies of this small head: some stay, some
# slow down, one is between.
_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _text_model(name: str, rope: dict[str, Any], tied: bool) -> Any:
    config = getattr(transformers, f"{name}Config")(
        **DENSE, tie_word_embeddings=tied, rope_parameters={**rope}
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _qwen3_vl(tied: bool) -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    config = transformers.Qwen3VLConfig(
        text_config={**DENSE, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={**tiny_qwen.vision_config(), "depth": 3, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=tied,
        **MEDIA_TOKENS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen2_5_vl(tied: bool) -> Any:
    # Windows of 16 x 16 pixels are 2 x 2 features; the middle block of the tower attends over whole
    # frames.
    windows = {"depth": 3, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    vision = {**tiny_qwen.vision_config(), **windows}
    del vision["num_position_embeddings"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {key: value for key, value in DENSE.items() if key != "head_dim"}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config=vision,
        tie_word_embeddings=tied,
        **MEDIA_TOKENS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[bool], Any]] = {
    "qwen3": partial(_text_model, "Qwen3", {"rope_type": "default", "rope_theta": 1e4}),
    "llama": partial(_text_model, "Llama", _LLAMA_ROPE),
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}


def sequences(family: str, kind: str) -> list[tiny_qwen.Sequence]:
    """Return the sequences of one modality, laid out as the family wants its videos."""
    if family != "qwen2_5_vl":
        return tiny_qwen.sequences(kind)
    parts = enumerate(ONE_RUN_SEQUENCES[kind])
    return [tiny_qwen.make_sequence(seed, part, ONE_RUN, SECONDS_PER_PATCH) for seed, part in parts]


def oracle_inputs(oracle: Any, part: tiny_qwen.Sequence) -> dict[str, torch.Tensor]:
    """Return the arguments of transformers' model for one sequence.

    It computes the positions itself, so that ours are checked too, but not after a video of
    Qwen2.5-VL: see `mrope_positions`.
    """
    inputs = tiny_qwen.oracle_inputs(part)
    if oracle.config.model_type == "qwen2_5_vl" and "video" in part.kinds:
        inputs["position_ids"] = part.positions[:, None]
    return inputs


def oracle_logits(oracle: Any, parts: list[tiny_qwen.Sequence]) -> torch.Tensor:
    """Return transformers' logits of separate sequences, laid end to end: `[tokens,
    vocabulary]`.
    """
    return torch.cat([oracle(**oracle_inputs(oracle, part)).logits[0] for part in parts])

"""Tiny random transformers models of every family: the oracles. Prompts and packing are those of `tiny_qwen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests import tiny_qwen

TEXT = ("text",)
ALL = tuple(tiny_qwen.SEQUENCES)
KINDS = {"qwen3_5": ALL, "qwen3_5_text": TEXT, "qwen3_vl": ALL, "qwen3": TEXT, "llama": TEXT}
"""Modalities of the families, by `model_type`."""
MEDIA_TOKENS = {
    "image_token_id": tiny_qwen.IMAGE,
    "video_token_id": tiny_qwen.VIDEO,
    "vision_start_token_id": tiny_qwen.VISION_START,
    "vision_end_token_id": tiny_qwen.VISION_END,
}
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


def _qwen3(tied: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DENSE, tie_word_embeddings=tied, rope_parameters=rope))


def _llama(tied: bool) -> Any:
    # The bounds of the stretching fall among the few frequencies of this small head: some stay, some slow down, one is between.
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e3,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DENSE, tie_word_embeddings=tied, rope_parameters=rope))


def _qwen3_vl(tied: bool) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**DENSE, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={**tiny_qwen.vision_config(), "depth": 3, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=tied,
        **MEDIA_TOKENS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


_BUILDERS = {"qwen3": _qwen3, "llama": _llama, "qwen3_vl": _qwen3_vl}


def sequences(family: str, kind: str) -> list[tiny_qwen.Sequence]:
    """Return the sequences of one modality, laid out as the family wants its videos."""
    return tiny_qwen.sequences(kind)

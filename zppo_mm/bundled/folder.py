"""Hugging Face folders of untrained tiny models: configs, tokenizer, processor settings and random
weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from data.media.sampling import FrameSampling
from zppo_mm.bundled.tokenizer import build_tokenizer

PATCH_SIZE = 16
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
SAMPLING = FrameSampling(frames_per_second=2, min_frames=2, max_frames=64)
"""Of their videos, in which every digit stays one second."""
VOCAB_MULTIPLE = 16
"""The vocabulary is padded to this, so that tensor-parallel ranks share it evenly."""
MAX_POSITIONS = 4096
INITIALIZER_RANGE = 0.06
"""Standard deviation of the first weights; the families' 0.02 is made for wide layers and wastes
updates in narrow ones.
"""
# A short base: positions here are tens, not thousands, of tokens apart.
ROPE = {
    "rope_type": "default",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySize:
    """Widths and depths of a tiny Qwen3.5-VL."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    linear_num_heads: int
    vision_depth: int
    vision_hidden_size: int
    full_attention_interval: int = 4
    head_dim: int = 32
    linear_key_head_dim: int = 16
    linear_value_head_dim: int = 32
    vision_num_heads: int = 4


def write_untrained(folder: str | Path, size: TinySize, seed: int) -> None:
    """Write a complete folder with random weights.

    Args:
        folder: Made if it is missing.
        size: Of the network.
        seed: Of the weights.
    """
    tokenizer = build_tokenizer()
    config = tiny_config(size, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in _settings(tokenizer).items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tiny_config(size: TinySize, tokenizer: PreTrainedTokenizerFast) -> Qwen3_5Config:
    """Return the config.json of a tiny model."""
    vocab_size = -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "head_dim": size.head_dim,
        "linear_num_key_heads": size.linear_num_heads,
        "linear_num_value_heads": size.linear_num_heads,
        "linear_key_head_dim": size.linear_key_head_dim,
        "linear_value_head_dim": size.linear_value_head_dim,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": size.full_attention_interval,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "initializer_range": INITIALIZER_RANGE,
        "eos_token_id": token_id(tokenizer, "<|im_end|>"),
        "pad_token_id": token_id(tokenizer, "<|endoftext|>"),
        "rope_parameters": dict(ROPE),
    }
    vision = {
        "depth": size.vision_depth,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": 2 * size.vision_hidden_size,
        "num_heads": size.vision_num_heads,
        "in_channels": 3,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "out_hidden_size": size.hidden_size,
        "num_position_embeddings": 16,
        "initializer_range": INITIALIZER_RANGE,
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=True,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"the tokenizer knows {token}"
    return found


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, Any]]:
    """Return the JSON files that transformers does not write by itself."""
    unit = (PATCH_SIZE * MERGE_SIZE) ** 2
    shared = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "processor_class": "Qwen3VLProcessor",
    }
    eos, pad = token_id(tokenizer, "<|im_end|>"), token_id(tokenizer, "<|endoftext|>")
    return {
        "preprocessor_config.json": {
            **shared,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": unit, "longest_edge": 256 * unit},
        },
        "video_preprocessor_config.json": {
            **shared,
            "video_processor_type": "Qwen3VLVideoProcessor",
            "fps": SAMPLING.frames_per_second,
            "min_frames": SAMPLING.min_frames,
            "max_frames": SAMPLING.max_frames,
            "size": {
                "shortest_edge": TEMPORAL_PATCH_SIZE * unit,
                "longest_edge": 256 * TEMPORAL_PATCH_SIZE * unit,
            },
        },
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": [eos, pad],
            "pad_token_id": pad,
        },
    }

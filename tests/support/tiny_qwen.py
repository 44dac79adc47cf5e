"""Tiny random Qwen3.5 models of transformers, prompts with media for them, and their forward pass
on separate sequences: the oracle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

from encoders.config import TIMESTAMPED, VideoLayout
from encoders.positions import mrope_positions

IMAGE, VIDEO, VISION_START, VISION_END, VOCABULARY = 120, 121, 122, 123, 128
PATCH, MERGE, TEMPORAL = 4, 2, 2
PATCH_ELEMENTS = 3 * TEMPORAL * PATCH * PATCH
Grid = tuple[int, int, int]


def rope_parameters(theta: float, fraction: float, section: list[int]) -> dict[str, Any]:
    """Return Qwen3.5's rotary settings; `section` has the frequencies of each axis."""
    return {
        "rope_type": "default",
        "rope_theta": theta,
        "partial_rotary_factor": fraction,
        "mrope_section": section,
        "mrope_interleaved": True,
    }


def text_config(*, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """Return a text config with four layers, the last of full attention, and grouped heads of both
    kinds.
    """
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 512,
        "full_attention_interval": 2,
        "tie_word_embeddings": tied,
        "rope_parameters": rope_parameters(1e4, 0.5, [3, 3, 2]),
    } | changes
    # transformers 5.17 writes this beside the others, and without it another value.
    config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"]
    return config


def vision_config(hidden_size: int = 64) -> dict[str, Any]:
    """Return a vision config with two blocks."""
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 36,
    }


def vision_language_model(
    *, tied: bool = False, seed: int = 0, **changes: Any
) -> Qwen3_5ForConditionalGeneration:
    """Return a random model in which every weight matters: norms and biases are random too."""
    torch.manual_seed(seed)
    text = text_config(tied=tied, **changes)
    config = Qwen3_5Config(
        text_config=text,
        vision_config=vision_config(text["hidden_size"]),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    return randomised(Qwen3_5ForConditionalGeneration(config))


def text_model(*, tied: bool = False, seed: int = 0, **changes: Any) -> Qwen3_5ForCausalLM:
    """Return a random text-only model."""
    torch.manual_seed(seed)
    return randomised(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**text_config(tied=tied, **changes))))


def randomised(model: Any) -> Any:
    """Spread the weights wide enough that logits differ and every path carries a gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # Slow decay: what a chunk leaves in the state must matter several chunks later.
                parameter.uniform_(-5.0, 1.0)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.08)
    return model.eval()


def save(model: Any, path: Path, **more: torch.Tensor) -> Path:
    """Save a model as a Hugging Face folder, with a tokenizer stand-in and further tensors in the
    weight file.
    """
    from safetensors.torch import load_file, save_file

    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps({"stand-in": True}))
    if more:
        file = path / "model.safetensors"
        save_file(
            {
                **load_file(file),
                **{name.replace("__", "."): tensor for name, tensor in more.items()},
            },
            file,
            metadata={"format": "pt"},
        )
    return path


@dataclass(frozen=True)
class Sequence:
    """One prompt with its media.

    Attributes:
        token_ids: `[tokens]`.
        positions: `[3, tokens]`.
        next_position: Position of the token after the last.
        patches: `[patches, patch elements]` of all its media.
        grids: In prompt order.
        kinds: `image` or `video` per grid.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    next_position: int
    patches: torch.Tensor
    grids: tuple[Grid, ...]
    kinds: tuple[str, ...]


Part = int | tuple[str, Grid]


def make_sequence(
    seed: int, parts: list[Part], layout: VideoLayout = TIMESTAMPED, seconds_per_patch: float = 1.0
) -> Sequence:
    """Return a sequence of text runs (a number of tokens) and media (`("image" | "video",
    grid)`).
    """
    draw = np.random.default_rng(seed)
    ids: list[int] = []
    grids: list[Grid] = []
    kinds: list[str] = []
    for part in parts:
        if isinstance(part, int):
            ids += draw.integers(1, 110, part).tolist()
            continue
        kind, (t, h, w) = part
        grids.append((t, h, w))
        kinds.append(kind)
        num_runs = t if kind == "video" and layout.timestamped else 1
        for _ in range(num_runs):
            ids += [*draw.integers(1, 110, 2).tolist(), VISION_START]
            ids += [VIDEO if kind == "video" else IMAGE] * (t * h * w // MERGE**2 // num_runs)
            ids.append(VISION_END)
    positions, following = mrope_positions(
        np.array(ids), grids, IMAGE, VIDEO, MERGE, layout, [seconds_per_patch] * len(grids)
    )
    count = sum(t * h * w for t, h, w in grids)
    patches = torch.from_numpy(draw.standard_normal((count, PATCH_ELEMENTS)).astype(np.float32))
    return Sequence(
        torch.tensor(ids),
        torch.from_numpy(positions),
        following,
        patches,
        tuple(grids),
        tuple(kinds),
    )


SEQUENCES: dict[str, list[list[Part]]] = {
    "text": [[9], [70], [3]],
    "image": [[4, ("image", (1, 4, 6)), 5], [2, ("image", (1, 2, 2)), 3, ("image", (1, 6, 4)), 2]],
    "video": [[3, ("video", (3, 4, 4)), 6], [1, ("video", (1, 2, 4)), 4]],
    "mixed": [
        [5, ("image", (1, 4, 4)), 3, ("video", (2, 4, 2)), 2],
        [40],
        [2, ("video", (2, 2, 2)), 1, ("image", (1, 2, 6)), 20],
    ],
}


def sequences(kind: str) -> list[Sequence]:
    """Return the sequences of one modality: `text`, `image`, `video` or `mixed`."""
    return [make_sequence(seed, parts) for seed, parts in enumerate(SEQUENCES[kind])]


def pack(parts: list[Sequence]) -> dict[str, torch.Tensor | None]:
    """Return the arguments of the network's forward pass for packed sequences."""
    lengths = torch.tensor([0, *(len(part.token_ids) for part in parts)])
    grids = [grid for part in parts for grid in part.grids]
    return {
        "token_ids": torch.cat([part.token_ids for part in parts]),
        "positions": torch.cat([part.positions for part in parts], 1),
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
        "patches": torch.cat([part.patches for part in parts]) if grids else None,
        "grids": torch.tensor(grids) if grids else None,
    }


def oracle_inputs(part: Sequence) -> dict[str, torch.Tensor]:
    """Return the arguments of transformers' model for one sequence."""
    ids = part.token_ids
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if not part.grids:
        return inputs
    inputs["mm_token_type_ids"] = ((ids == IMAGE).int() + 2 * (ids == VIDEO).int())[None]
    pieces = part.patches.split([t * h * w for t, h, w in part.grids])
    for kind, values, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [index for index, found in enumerate(part.kinds) if found == kind]
        if chosen:
            inputs[values] = torch.cat([pieces[index] for index in chosen])
            inputs[grid] = torch.tensor([part.grids[index] for index in chosen])
    return inputs


def oracle_logits(model: Any, parts: list[Sequence]) -> torch.Tensor:
    """Return transformers' logits of separate sequences, laid end to end: `[tokens,
    vocabulary]`.
    """
    return torch.cat([model(**oracle_inputs(part)).logits[0] for part in parts])

"""Tiny folders in block-quantised FP8, as large models are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 16
LINEARS = (
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    *(f"linear_attn.{part}.weight" for part in ("in_proj_qkv", "in_proj_z", "out_proj")),
)
"""Ends of the names of what is quantised."""


def quantise(
    folder: Path, suffixes: tuple[str, ...], block: int = BLOCK
) -> dict[str, torch.Tensor]:
    """Turn a folder's weights of these names into FP8 with one factor per block; returns what they
    were rounded to, in float32.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    rounded = {}
    for key in [key for key in tensors if key.endswith(suffixes)]:
        whole = tensors.pop(key).float()
        rows, columns = (-(-size // block) for size in whole.shape)
        scale = torch.rand(rows, columns).add(0.5).to(torch.bfloat16)
        grid = (
            scale.float()
            .repeat_interleave(block, 0)
            .repeat_interleave(block, 1)[: whole.shape[0], : whole.shape[1]]
        )
        tensors[key] = (whole / grid).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scale
        rounded[key] = tensors[key].float() * grid
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head", "embed_tokens", "in_proj_a", "in_proj_b", "conv1d"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return rounded

"""Block-quantised FP8 weights to the type that networks are built in.

A published FP8 folder keeps `X.weight` in float8 beside `X.weight_scale_inv`, one factor for every
block of rows and columns. What is quantised is decided tensor by tensor, by its type and the
presence of its factors: lists of excluded modules in config.json are spelled in module names that
differ between versions and model classes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from zppo_mm.errors import ModelError
from zppo_mm.models.families.settings import read_config_file

SCALE_SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)
QUANTIZATION_KEY = "quantization_config"


def read_block_size(folder: Path) -> tuple[int, int]:
    """Return rows and columns that share a factor, from config.json; the published size where it
    says nothing.

    Raises:
        ModelError: config.json names something else than two positive numbers.
    """
    path = folder / "config.json"
    settings = read_config_file(path).get(QUANTIZATION_KEY) or {} if path.is_file() else {}
    block = settings.get("weight_block_size") if isinstance(settings, dict) else settings
    if block is None:
        return DEFAULT_BLOCK
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(size, int) and size > 0 for size in block)
    ):
        raise ModelError(
            f"{path}: {QUANTIZATION_KEY}.weight_block_size is not supported, got {block!r}, "
            "expected two positive numbers; use a folder with block-wise factors, or one that is "
            "not quantised"
        )
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int] | None:
    """Return the shape that a weight's factors must have; `None` if such a weight cannot have
    any.
    """
    return None if len(shape) != 2 else (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def dequantise(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Multiply every block by its factor in float32 and round once.

    Only a strip of blocks is ever in float32, and the factors are broadcast, not repeated.

    Args:
        weight: `[rows, columns]` of a float8 type.
        scale: `[ceil(rows / block rows), ceil(columns / block columns)]`; the blocks at the edges
            may be cut.
        block: Rows and columns of a block.
        dtype: Of the result.

    Returns:
        `[rows, columns]`.
    """
    height, width = block
    whole = weight.shape[1] // width
    edge = whole * width
    result = torch.empty(weight.shape, dtype=dtype)
    for number, factors in enumerate(scale.float()):
        rows = slice(number * height, (number + 1) * height)
        strip = weight[rows].float()
        strip[:, :edge].view(len(strip), whole, width).mul_(factors[:whole, None])
        if edge < strip.shape[1]:
            strip[:, edge:].mul_(factors[whole])
        result[rows] = strip
    return result

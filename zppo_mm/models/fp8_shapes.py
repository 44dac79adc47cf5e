"""Whether FP8 matrix products can have the shapes of a network's linear layers."""

from __future__ import annotations

from collections.abc import Iterator

from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.layers.delta_heads import HeadLayout


def fp8_multiple(recipe: str) -> int:
    """Return what every size of an FP8 matrix product must be a multiple of.

    The hardware wants 16 along the axis that is summed up, which is each of the three in turn:
    forward pass, gradient of the input, gradient of the weight. MXFP8 has blocks of 32.
    """
    return 32 if recipe == "mxfp8" else 16


def check_fp8_shapes(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig
) -> None:
    """Check a rank's part of every linear layer; does nothing without FP8.

    Raises:
        ConfigError: A layer's rows or columns are no multiple, named with its sizes.
    """
    if not model.fp8:
        return
    multiple, tensor = fp8_multiple(model.fp8_recipe), parallel.tensor_model_parallel_size
    for name, rows, columns in linear_shapes(architecture, tensor):
        if rows % multiple or columns % multiple:
            raise ConfigError(
                f"model.fp8: {name} does not fit FP8 matrix products, got [{rows}, {columns}] on a "
                f"rank with parallel.tensor_model_parallel_size={tensor}, expected multiples of "
                f"{multiple}; choose another tensor size, or leave model.fp8 empty"
            )


def linear_shapes(architecture: Architecture, tensor: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, rows and columns of a rank's linear layers, each kind once."""
    hidden = architecture.hidden_size
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    queries = heads * (2 if architecture.output_gate else 1)
    if "full_attention" in architecture.layer_types:
        rows = (queries + 2 * groups) * architecture.head_dim // tensor
        yield "self_attention.linear_qkv", rows, hidden
        yield "self_attention.linear_proj", hidden, heads * architecture.head_dim // tensor
    if architecture.has_linear_attention:
        delta = HeadLayout(
            key_heads=architecture.linear_num_key_heads // tensor,
            value_heads=architecture.linear_num_value_heads // tensor,
            key_dim=architecture.linear_key_head_dim,
            value_dim=architecture.linear_value_head_dim,
        )
        yield "self_attention.in_proj", sum(delta.projection), hidden
        yield "self_attention.out_proj", hidden, delta.value_heads * delta.value_dim
    yield "mlp.linear_fc1", 2 * architecture.ffn_hidden_size // tensor, hidden
    yield "mlp.linear_fc2", hidden, architecture.ffn_hidden_size // tensor

"""What the backward pass keeps of a token or a patch, in bytes.

Counted for the layers in plain torch (`transformer_impl: local`), tensor by tensor;
`tests/unit/test_planning_memory.py` compares the sums with what autograd holds. Transformer Engine
and flash-linear-attention keep less.
"""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.models.families.architecture import Architecture, LayerType
from zppo_mm.models.layers.delta_rule import MAX_CHUNK_TOKENS_CPU, MAX_CHUNK_TOKENS_GPU

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Precision:
    """How a network is computed.

    Attributes:
        element: Bytes of a number in the network's type.
        on_gpu: Whether a GPU computes it, whose DeltaNet keeps other tensors.
    """

    element: int = 2
    on_gpu: bool = True


def layer_bytes(
    architecture: Architecture, kind: LayerType, layout: ParallelConfig, precision: Precision
) -> float:
    """Return what a decoder layer keeps of a token on a rank, its input included."""
    tensor = layout.tensor_model_parallel_size
    mixer = _delta_net if kind == "linear_attention" else _attention
    norms = 2 * norm_bytes(architecture.hidden_size, precision)
    # The fused projection; the gate's SiLU, the other half, their product.
    feed_forward = 5 * architecture.ffn_hidden_size * precision.element
    inside = mixer(architecture, precision) + feed_forward
    return norms / shards_of_hidden(layout) + inside / tensor


def boundary_bytes(
    architecture: Architecture, layout: ParallelConfig, precision: Precision
) -> float:
    """Return what full recomputation keeps of a token per layer: the layer's input."""
    return architecture.hidden_size * precision.element / shards_of_hidden(layout)


def shards_of_hidden(layout: ParallelConfig) -> int:
    """Return over how many ranks hidden states between the tensor-parallel regions are divided."""
    return layout.tensor_model_parallel_size if layout.sequence_parallel else 1


def norm_bytes(width: int, precision: Precision) -> int:
    """Return what a norm and the linear layer after it keep: the input and the normalised values in
    float32, and the result.
    """
    return width * (2 * FLOAT32 + precision.element) + FLOAT32


def _attention(architecture: Architecture, precision: Precision) -> float:
    heads, groups = architecture.num_attention_heads, architecture.num_query_groups
    gates = heads if architecture.output_gate else 0
    projection = heads + gates + 2 * groups
    # The whole projection, of which values are a view; rotated queries and keys, and the result.
    kept = (projection + 2 * heads + groups) * precision.element
    # The gate's sigmoid and the product.
    kept += 2 * gates * precision.element
    if architecture.qk_norm:
        # As `norm_bytes`, without a result; in float32 the keys are a view of the projection.
        kept += (2 * heads + (2 if precision.element < FLOAT32 or gates else 1) * groups) * FLOAT32
    # Sines and cosines in the network's type, for queries and for keys.
    tables = 4 * architecture.rotary_dim * precision.element if precision.element < FLOAT32 else 0
    return kept * architecture.head_dim + heads * FLOAT32 + tables


def _delta_net(architecture: Architecture, precision: Precision) -> float:
    keys = architecture.linear_num_key_heads * architecture.linear_key_head_dim
    values = architecture.linear_num_value_heads * architecture.linear_value_head_dim
    heads, element = architecture.linear_num_value_heads, precision.element
    channels = 2 * keys + values
    # Inputs and outputs of the convolution, gates of the recurrence, input of the output layer.
    kept = 2 * channels * element + 3 * heads * FLOAT32 + values * element
    # The gated norm: its input, normalised and scaled values, the gate and its SiLU.
    kept += 4 * values * FLOAT32
    # In float32 the gate is a view of the whole projection.
    kept += values * FLOAT32 if element < FLOAT32 else (channels + values + 2 * heads) * FLOAT32
    if element == FLOAT32:
        # Queries and keys are views of the activated convolution.
        kept += channels * FLOAT32
    return kept + _chunked_rule(architecture, keys, values, precision) * FLOAT32


def _chunked_rule(
    architecture: Architecture, keys: int, values: int, precision: Precision
) -> float:
    """Return the float32 numbers that `chunk_gated_delta_rule` keeps of a token."""
    heads, key_dim = architecture.linear_num_value_heads, architecture.linear_key_head_dim
    repeated = heads * key_dim
    chunk = MAX_CHUNK_TOKENS_GPU if precision.on_gpu else MAX_CHUNK_TOKENS_CPU
    # Queries and keys in chunks, and for every value head where those are more.
    kept = 2.0 * keys + (2 * repeated if heads > architecture.linear_num_key_heads else 0)
    # Before normalisation, where that is a copy.
    kept += 2 * keys if precision.element < FLOAT32 else 0
    # Six matrices of a chunk and three decays.
    kept += heads * (6 * chunk + 3)
    # Both sides of the triangular system, writes, keys and queries of the scan.
    kept += 2 * (values + repeated) + values + 2 * repeated
    # A state per chunk.
    kept += values * key_dim / chunk
    if precision.on_gpu:
        # What a state is multiplied with to get the next, and a copy of the values.
        kept += repeated * key_dim / chunk + values
    return kept

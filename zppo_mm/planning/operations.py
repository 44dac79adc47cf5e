"""How much a pass through a network has to do, from its shapes."""

from __future__ import annotations

from dataclasses import dataclass

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.layers.delta_rule import MAX_CHUNK_TOKENS_CPU
from zppo_mm.planning.activations import FLOAT32, Precision, layer_bytes
from zppo_mm.planning.machine import MachineRates, PassRates

SAMPLING_PASSES = 8
"""Times that the logits of a token pass through memory while one is drawn."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done.

    Attributes:
        flops: Floating-point operations of products; a multiplication with its addition is two.
        traffic: Bytes to and from memory beside the products.
        layers: Layers that are called.
    """

    flops: float = 0.0
    traffic: float = 0.0
    layers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.traffic + other.traffic, self.layers + other.layers
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.traffic * factor, self.layers * factor)

    def seconds(self, machine: MachineRates, rates: PassRates) -> float:
        """Return how long it takes: calls, products and traffic one after the other."""
        return (
            self.layers * rates.layer_seconds
            + self.flops / (machine.matmul_flops * rates.matmul_efficiency)
            + self.traffic / (machine.memory_bandwidth * rates.bandwidth_efficiency)
        )


def linear_parameters(architecture: Architecture) -> int:
    """Return the weights of the linear layers of the decoder."""
    hidden = architecture.hidden_size
    heads = architecture.num_attention_heads * (3 if architecture.output_gate else 2)
    attention = hidden * (heads + 2 * architecture.num_query_groups) * architecture.head_dim
    keys = architecture.linear_num_key_heads * architecture.linear_key_head_dim
    values = architecture.linear_num_value_heads * architecture.linear_value_head_dim
    delta = hidden * (2 * keys + 3 * values + 2 * architecture.linear_num_value_heads)
    kinds = architecture.layer_types
    return (
        kinds.count("full_attention") * attention
        + kinds.count("linear_attention") * delta
        + len(kinds) * 3 * hidden * architecture.ffn_hidden_size
    )


def forward_flops(architecture: Architecture, tokens: float, context: float) -> float:
    """Return the operations of the decoder's layers for some tokens.

    Args:
        architecture: The network.
        tokens: That pass through it.
        context: Mean number of tokens that each attends to.
    """
    kinds = architecture.layer_types
    flops = 2.0 * linear_parameters(architecture)
    width = architecture.num_attention_heads * architecture.head_dim
    flops += kinds.count("full_attention") * 4 * width * context
    key_dim, value_dim = architecture.linear_key_head_dim, architecture.linear_value_head_dim
    # Inside a chunk: products of keys and queries, the triangular system, reads; then the state.
    rule = MAX_CHUNK_TOKENS_CPU * (2 * key_dim + (key_dim + value_dim) / 2 + value_dim)
    rule += 3 * key_dim * value_dim
    flops += kinds.count("linear_attention") * 2 * architecture.linear_num_value_heads * rule
    return flops * tokens


def tower_flops(architecture: Architecture, patches: float, media: float) -> float:
    """Return the operations of the vision tower.

    Args:
        architecture: The network.
        patches: Of all media.
        media: How many these are; each attends inside itself.
    """
    if architecture.vision is None or not patches:
        return 0.0
    vision = architecture.vision
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    per_patch = 2 * (4 * width**2 + 2 * width * inner) + 4 * width * patches / media
    return float(vision["depth"] * per_patch * patches)


def train_passes(recompute: str) -> int:
    """Return the passes through the decoder in training, of which the backward pass is two; with
    `full`, every layer is computed again.
    """
    return 4 if recompute == "full" else 3


def forward_work(
    architecture: Architecture, layout: ParallelConfig, tokens: float, context: float
) -> Work:
    """Return a rank's work for a forward pass over some tokens of the decoder, without calls.

    Args:
        architecture: The network.
        layout: Divides layers, heads and tokens.
        tokens: Of a replica.
        context: Mean number of tokens that each attends to.
    """
    ranks = (
        layout.tensor_model_parallel_size
        * layout.pipeline_model_parallel_size
        * layout.context_parallel_size
    )
    alone = ParallelConfig()
    kept = sum(
        layer_bytes(architecture, kind, alone, Precision()) for kind in architecture.layer_types
    )
    return Work(forward_flops(architecture, tokens, context), tokens * kept) * (1 / ranks)


def output_flops(architecture: Architecture, rows: float) -> float:
    """Return the operations of the output layer for some rows."""
    return 2.0 * architecture.vocab_size * architecture.hidden_size * rows


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Seconds of one token for every sequence of a batch: `fixed`, plus `per_sequence` for each,
    plus `per_token` for every token that their caches hold; at least what reading the weights
    takes.
    """

    fixed: float
    weights: float
    per_sequence: float
    state: float
    per_token: float

    def seconds(self, batch: int, cached_tokens: float) -> float:
        """Return the seconds of a step."""
        return (
            self.fixed
            + max(self.weights, self.per_sequence * batch)
            + self.state * batch
            + self.per_token * cached_tokens
        )


def decode_work(architecture: Architecture) -> tuple[float, float, float]:
    """Return of one sequence the operations of a decoding step, the bytes beside the weights and
    the cache, and the cache's bytes of a token per byte of an element.
    """
    flops = 2.0 * linear_parameters(architecture) + output_flops(architecture, 1)
    kinds = architecture.layer_types
    state = architecture.linear_num_value_heads * architecture.linear_key_head_dim
    state *= architecture.linear_value_head_dim
    # Read twice and written once.
    traffic = kinds.count("linear_attention") * 3 * state * FLOAT32
    traffic += SAMPLING_PASSES * architecture.vocab_size * FLOAT32
    cached = 2 * architecture.num_query_groups * architecture.head_dim
    return flops, traffic, kinds.count("full_attention") * cached


def decode_step(
    architecture: Architecture, tensor: int, machine: MachineRates, rates: PassRates
) -> DecodeStep:
    """Return the rates of a decoding loop; pipeline stages wait for one another.

    Args:
        architecture: The network.
        tensor: GPUs that share every layer.
        machine: Its rates.
        rates: How near the loop comes to them.
    """
    flops, traffic, cached = decode_work(architecture)
    element = machine.element_bytes
    bandwidth = machine.memory_bandwidth * rates.bandwidth_efficiency
    layers = architecture.num_layers + 1
    fixed = layers * rates.layer_seconds
    if tensor > 1:
        fixed += 2 * layers * machine.message_seconds
    return DecodeStep(
        fixed=fixed,
        weights=flops / 2 * element / tensor / bandwidth,
        per_sequence=flops / tensor / (machine.matmul_flops * rates.matmul_efficiency),
        state=traffic / tensor / bandwidth,
        per_token=cached * element / tensor / bandwidth,
    )

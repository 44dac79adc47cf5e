"""How much GPU memory a run needs, counted from shapes before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from encoders.tower_memory import tower_activations
from zppo_mm.algorithms.row_loss import MAX_CHUNK_LOGITS
from zppo_mm.config.schema import ParallelConfig, RunConfig
from zppo_mm.conversion.description import (
    GRADIENT_BYTES,
    MOMENT_BYTES,
    OPTIMIZER_BYTES,
    WEIGHT_BYTES,
    fitting_layouts,
)
from zppo_mm.errors import ConfigError
from zppo_mm.models.decoding.cache_size import GIB, CacheSize
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.provider import recomputes_vision
from zppo_mm.run.shared import longest_prompt
from zppo_mm.text_table import text_table
from zppo_mm.weights.mapping import parameter_mappings
from zppo_mm.weights.megatron_folder import build_without_weights

CHUNK_LOGIT_BYTES = 16
"""Of a logit in a chunk: in bfloat16, in float32, scaled, and both gradients."""
OUTPUT_WEIGHT_BYTES = 6
"""Gradient of the output layer's weight, in float32 and rounded to bfloat16."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the fullest GPU of the student, by what they hold.

    Not counted: temporaries of single kernels, logits and prefill while sampling, communication
    buffers, the CUDA context, and fragmentation. A fifth of the GPU should stay free for them.

    Attributes:
        weights: bfloat16, tensor and pipeline parallel; the vision tower is whole on the first
            stage.
        gradients: float32, not sharded over replicas.
        optimizer: float32 copy and two moments, sharded over replicas by the distributed optimizer.
        update: What the moments need more during an update, if they are kept in bfloat16.
        activations: What the backward pass keeps of the longest pack.
        vision: The same of the vision tower, of a micro-batch or a prompt full of media.
        output: Of the output layer in training: a chunk of logits, the gradient of the weight, and
            the loss tokens' hidden states with their gradient.
        cache: Keys, values and DeltaNet states of one batch of rollouts with the longest prompts
            and responses, at most `rollout.cache_memory_gib`.
        offloaded: Of the gradients and the optimizer state, what is not on the GPU while sampling;
            the state is in host memory then.
    """

    weights: int
    gradients: int
    optimizer: int
    update: int
    activations: int
    vision: int
    output: int
    cache: int
    offloaded: int = 0

    @property
    def peak(self) -> int:
        """Return the largest of the passes through the network, the update and sampling, which take
        turns; all keep the weights, gradient buffers and optimizer state, but for sampling what is
        offloaded.
        """
        kept = self.weights + self.gradients + self.optimizer
        passes = self.activations + self.vision + self.output
        return kept + max(passes, self.update, self.cache - self.offloaded)


def estimate_memory(
    architecture: Architecture, config: RunConfig, num_student_ranks: int
) -> MemoryEstimate:
    """Count the memory of a full-parameter run in bfloat16; process groups of one rank must be
    initialised.

    Args:
        architecture: Of the student.
        config: The run.
        num_student_ranks: GPUs of the student.

    Raises:
        ConfigError: The network does not fit the layout, or the layout the ranks.
    """
    layout = config.parallel
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    model_ranks = tensor * pipeline
    if num_student_ranks % (model_ranks * layout.context_parallel_size):
        raise ConfigError(
            f"parallel: does not divide the student's ranks, got tensor {tensor} x pipeline "
            f"{pipeline} x context {layout.context_parallel_size} for {num_student_ranks} ranks, "
            "expected a divisor; change the sizes or the number of GPUs"
        )
    parameters = _fullest_rank(architecture, tensor, pipeline)
    # The context ranks hold the same weights and share the optimizer state too.
    sharded_over = num_student_ranks // model_ranks if layout.use_distributed_optimizer else 1
    moments = parameters * MOMENT_BYTES // sharded_over
    in_bfloat16 = config.train.optimizer_state_dtype == "bfloat16"
    longest = longest_prompt(config) + config.rollout.max_response_tokens
    pack = max(config.train.micro_batch_tokens, longest) // layout.context_parallel_size
    loss_tokens = max(config.train.micro_batch_tokens, config.rollout.max_response_tokens)
    gradients = parameters * GRADIENT_BYTES
    optimizer = parameters * OPTIMIZER_BYTES // sharded_over - in_bfloat16 * moments // 2
    return MemoryEstimate(
        weights=parameters * WEIGHT_BYTES,
        gradients=gradients,
        optimizer=optimizer,
        update=in_bfloat16 * moments // 2,
        activations=_activations(architecture, layout, config.model.recompute, pack),
        vision=_vision_activations(architecture, config),
        output=MAX_CHUNK_LOGITS * CHUNK_LOGIT_BYTES
        + architecture.vocab_size // tensor * architecture.hidden_size * OUTPUT_WEIGHT_BYTES
        + loss_tokens // layout.context_parallel_size * architecture.hidden_size * 2 * WEIGHT_BYTES,
        cache=_cache(architecture, config),
        offloaded=layout.offload_optimizer * (gradients + optimizer),
    )


def format_estimate(estimate: MemoryEstimate) -> str:
    """Return a table in GiB."""
    names = [own.name for own in fields(estimate)] + ["peak"]
    rows = [[name, f"{getattr(estimate, name) / GIB:.1f}"] for name in names]
    return text_table(["on the fullest GPU", "GiB"], rows)


def _fullest_rank(architecture: Architecture, tensor: int, pipeline: int) -> int:
    """Return the parameters of the fullest rank."""
    mappings = list(parameter_mappings(build_without_weights(architecture, ParallelConfig())))
    for layout in fitting_layouts(architecture, mappings):
        if (layout.tensor, layout.pipeline) == (tensor, pipeline):
            return layout.num_parameters
    raise ConfigError(
        f"parallel: the network does not fit this layout, got tensor {tensor} x pipeline "
        f"{pipeline}, expected one that tools/convert_checkpoint.py inspect lists; change the sizes"
    )


def _activations(
    architecture: Architecture, layout: ParallelConfig, recompute: str, tokens: int
) -> int:
    """Return the bytes that the backward pass keeps of a rank's part of the longest pack.

    With full recomputation those are the input of every layer and the inside of one; without, the
    inside of every layer.
    """
    tensor = layout.tensor_model_parallel_size
    split = tensor if layout.sequence_parallel else 1
    attention = (2 * architecture.num_attention_heads + 2 * architecture.num_query_groups) * (
        architecture.head_dim
    )
    delta = 2 * (
        architecture.linear_num_key_heads * architecture.linear_key_head_dim
        + architecture.linear_num_value_heads * architecture.linear_value_head_dim
    )
    # Inputs and outputs of the two norms; projections; gate, up and product of the MLP.
    width = 4 * architecture.hidden_size // split
    width += (max(attention, delta) + 3 * architecture.ffn_hidden_size) // tensor
    layers = architecture.num_layers // layout.pipeline_model_parallel_size
    if recompute == "full":
        elements = layers * architecture.hidden_size // split + width
    else:
        elements = layers * width
    return tokens * elements * WEIGHT_BYTES


def _vision_activations(architecture: Architecture, config: RunConfig) -> int:
    """Return the bytes that the backward pass of the tower keeps at the most."""
    if architecture.vision is None or "vision" in config.train.freeze:
        return 0
    of_a_prompt = config.data.max_prompt_tokens * architecture.spatial_merge_size**2
    patches = max(config.train.micro_batch_patches, of_a_prompt)
    kept = tower_activations(architecture.family, architecture.vision)
    return patches * kept.peak(recomputes_vision(config.model))


def _cache(architecture: Architecture, config: RunConfig) -> int:
    """Return the bytes of the decoding cache: of full rows with the longest prompts and responses,
    prompts shared by their rollouts, within the budget.
    """
    rollout, layout = config.rollout, config.parallel
    size = CacheSize.of(
        architecture,
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        WEIGHT_BYTES,
    )
    rows = rollout.max_batch_size
    num_blocks = rows * size.blocks_of(rollout.max_response_tokens)
    num_blocks += -(-rows // rollout.num_rollouts) * size.blocks_of(longest_prompt(config))
    return min(int(rollout.cache_memory_gib * GIB), size.num_bytes(num_blocks, rows))

"""How much GPU memory a run needs, counted from shapes before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from encoders.tower_memory import VALUE_BYTES, tower_activations
from zppo_mm.algorithms.row_loss import MAX_CHUNK_LOGITS_GPU
from zppo_mm.config.schema import ParallelConfig, RunConfig
from zppo_mm.conversion.description import (
    GRADIENT_BYTES,
    MOMENT_BYTES,
    OPTIMIZER_BYTES,
    WEIGHT_BYTES,
    LayoutMemory,
    fitting_layouts,
)
from zppo_mm.errors import ConfigError
from zppo_mm.models.decoding.cache_size import GIB, CacheSize
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.provider import recomputes_vision
from zppo_mm.planning.activations import (
    FLOAT32,
    Precision,
    boundary_bytes,
    layer_bytes,
    shards_of_hidden,
)
from zppo_mm.run.shared import longest_answer, longest_prompt
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

    Not counted: temporaries of single kernels, gradients of activations, logits and prefill while
    sampling, communication buffers, the CUDA context, and fragmentation. A fifth of the GPU should
    stay free for them.

    Attributes:
        weights: bfloat16, tensor and pipeline parallel; the vision tower is whole on the first
            stage.
        gradients: float32, not sharded over replicas.
        optimizer: float32 copy and two moments, sharded over replicas by the distributed optimizer.
        update: What the moments need more during an update, if they are kept in bfloat16.
        activations: What the backward pass keeps of the longest pack in the language model.
        vision: The same of the vision tower, of a micro-batch or a prompt full of media.
        output: Of the output layer in training: a chunk of logits, the gradient of the weight, and
            the loss tokens' hidden states with their gradient.
        cache: Keys, values and DeltaNet states of one batch of rollouts with the longest prompts
            and responses, at most `rollout.cache_memory_gib`; 0 where vLLM samples.
        offloaded: Of the gradients and the optimizer state, what is not on the GPU while sampling;
            the state is in host memory then.
        teacher: Weights of a teacher on the student's ranks.
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
    teacher: int = 0

    @property
    def peak(self) -> int:
        """Return the largest of the passes through the network, the update and sampling, which take
        turns; all keep the weights, gradient buffers and optimizer state, but for sampling what is
        offloaded.
        """
        kept = self.weights + self.gradients + self.optimizer + self.teacher
        passes = self.activations + self.vision + self.output
        return kept + max(passes, self.update, self.cache - self.offloaded)


def rank_parameters(architecture: Architecture) -> list[LayoutMemory]:
    """Return the tensor and pipeline sizes that the network can be split into, with the parameters
    of the fullest rank; process groups of one rank must be initialised.
    """
    mappings = list(parameter_mappings(build_without_weights(architecture, ParallelConfig())))
    return fitting_layouts(architecture, mappings)


def estimate_memory(
    architecture: Architecture,
    config: RunConfig,
    num_student_ranks: int,
    splits: list[LayoutMemory] | None = None,
    precision: Precision | None = None,
) -> MemoryEstimate:
    """Count the memory of a full-parameter run in bfloat16.

    Args:
        architecture: Of the student.
        config: The run.
        num_student_ranks: GPUs of the student.
        splits: From `rank_parameters`, which is called if they are not given.
        precision: How the network is computed; in bfloat16 with plain torch if not given.

    Raises:
        ConfigError: The network does not fit the layout, or the layout the ranks.
    """
    layout, precision = config.parallel, precision or Precision()
    model_ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    if num_student_ranks % (model_ranks * layout.context_parallel_size):
        raise ConfigError(
            "parallel: does not divide the student's ranks, got tensor "
            f"{layout.tensor_model_parallel_size} x pipeline {layout.pipeline_model_parallel_size}"
            f" x context {layout.context_parallel_size} for {num_student_ranks} ranks, expected a "
            "divisor; change the sizes or the number of GPUs"
        )
    parameters = fullest_rank(splits or rank_parameters(architecture), layout)
    # The context ranks hold the same weights and share the optimizer state too.
    sharded_over = num_student_ranks // model_ranks if layout.use_distributed_optimizer else 1
    moments = parameters * MOMENT_BYTES // sharded_over
    in_bfloat16 = config.train.optimizer_state_dtype == "bfloat16"
    # In float32 the optimizer's copy is the weights themselves.
    state = OPTIMIZER_BYTES if precision.element < FLOAT32 else MOMENT_BYTES
    longest, response = longest_trained(config)
    pack = max(config.train.micro_batch_tokens, longest) // layout.context_parallel_size
    loss_tokens = max(config.train.micro_batch_tokens, response)
    gradients = parameters * GRADIENT_BYTES
    optimizer = parameters * state // sharded_over - in_bfloat16 * moments // 2
    return MemoryEstimate(
        weights=parameters * precision.element,
        gradients=gradients,
        optimizer=optimizer,
        update=in_bfloat16 * moments // 2,
        activations=activations(architecture, layout, config.model.recompute, pack, precision),
        vision=vision_activations(architecture, config, precision),
        output=_output(architecture, layout, loss_tokens),
        cache=cache_bytes(architecture, config, precision) * (config.rollout.engine != "vllm"),
        offloaded=layout.offload_optimizer * (gradients + optimizer),
    )


def longest_trained(config: RunConfig) -> tuple[int, int]:
    """Return the tokens of the longest sample that is trained on, and of its response: of the
    student's own, or where the teacher's responses are trained on, of theirs after a plain prompt.
    """
    response = config.rollout.max_response_tokens
    own = (longest_prompt(config) + response, response)
    answer = longest_answer(config)
    teachers = (config.data.max_prompt_tokens + answer, answer)
    if config.distill.source == "teacher":
        return teachers
    if config.zone.inject:
        return max(own[0], teachers[0]), max(own[1], teachers[1])
    return own


def format_estimate(estimate: MemoryEstimate) -> str:
    """Return a table in GiB."""
    names = [own.name for own in fields(estimate)] + ["peak"]
    rows = [[name, f"{getattr(estimate, name) / GIB:.1f}"] for name in names]
    return text_table(["on the fullest GPU", "GiB"], rows)


def fullest_rank(splits: list[LayoutMemory], layout: ParallelConfig) -> int:
    """Return the parameters of the fullest rank.

    Raises:
        ConfigError: The network does not fit the layout.
    """
    asked = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
    for split in splits:
        if (split.tensor, split.pipeline) == asked:
            return split.num_parameters
    raise ConfigError(
        f"parallel: the network does not fit this layout, got tensor {asked[0]} x pipeline "
        f"{asked[1]}, expected one that tools/convert_checkpoint.py inspect lists; change the sizes"
    )


def activations(
    architecture: Architecture,
    layout: ParallelConfig,
    recompute: str,
    tokens: int,
    precision: Precision,
) -> int:
    """Return the bytes that the backward pass keeps of a rank's part of a pack.

    With full recomputation those are the input of every layer and the inside of the largest one;
    without, the inside of every layer. The first pipeline stage has as many micro-batches under
    way as there are stages.
    """
    pipeline = layout.pipeline_model_parallel_size
    stage = architecture.layer_types[: architecture.num_layers // pipeline]
    inside = [layer_bytes(architecture, kind, layout, precision) for kind in stage]
    # The last norm, whose result is counted with the output layer.
    around = 2 * FLOAT32 * architecture.hidden_size / shards_of_hidden(layout)
    if recompute == "full":
        kept = len(stage) * boundary_bytes(architecture, layout, precision)
        table = 2 * architecture.rotary_dim * FLOAT32
        return int(tokens * (pipeline * (kept + table + around) + max(inside, default=0)))
    return int(tokens * pipeline * (sum(inside) + around))


def vision_activations(architecture: Architecture, config: RunConfig, precision: Precision) -> int:
    """Return the bytes that the backward pass of the tower keeps at the most."""
    if architecture.vision is None or "vision" in config.train.freeze:
        return 0
    of_a_prompt = config.data.max_prompt_tokens * architecture.spatial_merge_size**2
    patches = max(config.train.micro_batch_patches, of_a_prompt)
    kept = tower_activations(architecture.family, architecture.vision)
    # Nearly all of it is in the network's type.
    size = kept.peak(recomputes_vision(config.model)) * precision.element // VALUE_BYTES
    return patches * size


def cache_bytes(architecture: Architecture, config: RunConfig, precision: Precision) -> int:
    """Return the bytes of the decoding cache: of full rows with the longest prompts and responses,
    prompts shared by their rollouts, within the budget.
    """
    rollout, layout = config.rollout, config.parallel
    size = CacheSize.of(
        architecture,
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        precision.element,
    )
    rows = rollout.max_batch_size
    num_blocks = rows * size.blocks_of(rollout.max_response_tokens)
    num_blocks += -(-rows // rollout.num_rollouts) * size.blocks_of(longest_prompt(config))
    return int(min(rollout.cache_memory_gib * GIB, size.num_bytes(num_blocks, rows)))


def _output(architecture: Architecture, layout: ParallelConfig, loss_tokens: int) -> int:
    """Return the bytes of the output layer and the loss."""
    hidden = architecture.hidden_size
    rows = architecture.vocab_size // layout.tensor_model_parallel_size
    tokens = loss_tokens // layout.context_parallel_size
    return (
        MAX_CHUNK_LOGITS_GPU * CHUNK_LOGIT_BYTES
        + rows * hidden * OUTPUT_WEIGHT_BYTES
        + tokens * hidden * 2 * WEIGHT_BYTES
    )

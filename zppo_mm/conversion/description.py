"""The headers of a Hugging Face folder: the network, its size, the layouts that it fits, and how
its prompts end.

No weight is read.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.conversion.chat import prefix_facts
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import Architecture, check_layout, load_architecture
from zppo_mm.text_table import text_table
from zppo_mm.weights.hf_export import open_source
from zppo_mm.weights.mapping import Mapping, parameter_mappings, tied_copies
from zppo_mm.weights.megatron_folder import build_without_weights, check_shapes
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

SIZES = (1, 2, 4, 8)
"""Tensor and pipeline sizes that are tried."""
WEIGHT_BYTES = 2
"""bfloat16."""
GRADIENT_BYTES = 4
"""Gradients are summed in float32."""
MOMENT_BYTES = 8
"""Adam's two averages in float32."""
OPTIMIZER_BYTES = 4 + MOMENT_BYTES
"""They and a float32 copy of the weight."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class LayoutMemory:
    """Parameters of the fullest rank at one layout."""

    tensor: int
    pipeline: int
    num_parameters: int

    def gib(self, bytes_per_parameter: int) -> float:
        return self.num_parameters * bytes_per_parameter / _GIB


def describe_folder(hf_dir: Path) -> str:
    """Return the description as text; one process, process groups initialised.

    Raises:
        ModelError: The folder is not usable.
    """
    architecture = load_architecture(hf_dir)
    source = SafetensorsFolder(hf_dir)
    model = build_without_weights(architecture, ParallelConfig())
    mappings = list(parameter_mappings(model))
    open_source(model, source)
    check_shapes(mappings, source, architecture)
    counts = count_parameters(architecture, mappings, source)
    facts = [
        ("family", f"{architecture.title} ({architecture.family})"),
        (
            "layers",
            ", ".join(
                f"{count} {kind}" for kind, count in Counter(architecture.layer_types).most_common()
            ),
        ),
        ("hidden, feed-forward", f"{architecture.hidden_size}, {architecture.ffn_hidden_size}"),
        (
            "heads, KV heads, width",
            f"{architecture.num_attention_heads}, {architecture.num_query_groups}, "
            f"{architecture.head_dim}",
        ),
        (
            "vocabulary",
            f"{architecture.vocab_size:,}"
            f"{', tied to the output' if architecture.tie_word_embeddings else ''}",
        ),
        ("longest context", f"{architecture.max_position_embeddings:,} tokens"),
        *prefix_facts(hf_dir),
        *((f"parameters, {part}", f"{count:,}") for part, count in counts.items()),
        ("parameters in all", f"{sum(counts.values()):,}"),
        *(
            (f"in the files, {name}", f"{count} tensors, {size / _GIB:.3f} GiB")
            for name, (count, size) in stored_types(source).items()
        ),
    ]
    layouts = fitting_layouts(architecture, mappings)
    rows = [
        [
            str(layout.tensor),
            str(layout.pipeline),
            *(
                f"{layout.gib(size):.2f}"
                for size in (WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES)
            ),
            f"{layout.gib(WEIGHT_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES):.2f}",
        ]
        for layout in layouts
    ]
    head = ["tensor", "pipeline", "weights", "gradients", "optimizer", "together"]
    note = (
        "GiB on the fullest GPU, bfloat16 weights, float32 gradients and optimizer "
        f"({OPTIMIZER_BYTES} bytes a parameter, to be divided by the data-parallel size with the "
        "distributed optimizer); activations come on top."
    )
    described = text_table(["", str(hf_dir)], facts, num_left=2)
    return "\n\n".join([described, text_table(head, rows), note])


def count_parameters(
    architecture: Architecture, mappings: list[Mapping], source: SafetensorsFolder
) -> dict[str, int]:
    """Return the numbers of the folder's parameters: of the language model, the vision tower, and
    outside the network.
    """
    mapped = {key for mapping in mappings for key in mapping.keys}
    counts = {"language": 0, "vision": 0, "passed through": 0}
    # A copy of the embedding is no parameter.
    for key in source.weight_map.keys() - set(tied_copies(architecture, source).values()):
        inside = (
            "vision"
            if architecture.vision_prefix and key.startswith(architecture.vision_prefix)
            else "language"
        )
        counts[inside if key in mapped else "passed through"] += math.prod(source.shape(key))
    return counts


def stored_types(source: SafetensorsFolder) -> dict[str, tuple[int, int]]:
    """Return number and bytes of the tensors of every type, as they are stored; factors of
    quantised weights count.
    """
    found: defaultdict[str, list[int]] = defaultdict(list)
    for header in source.stored_headers().values():
        for entry in header.entries.values():
            found[entry.dtype].append(entry.size_bytes)
    return {
        name: (len(sizes), sum(sizes))
        for name, sizes in sorted(found.items(), key=lambda item: -sum(item[1]))
    }


def fitting_layouts(architecture: Architecture, mappings: list[Mapping]) -> list[LayoutMemory]:
    """Return the layouts that the network can be split into, with the parameters of the fullest
    rank.

    Args:
        architecture: The network.
        mappings: Of the whole network in one piece.
    """
    fitting = []
    for tensor in SIZES:
        for pipeline in SIZES:
            try:
                check_layout(
                    architecture,
                    ParallelConfig(
                        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
                    ),
                )
            except ModelError:
                continue
            fitting.append(
                LayoutMemory(
                    tensor,
                    pipeline,
                    max(_stage_parameters(architecture, mappings, tensor, pipeline)),
                )
            )
    return fitting


def _stage_parameters(
    architecture: Architecture, mappings: list[Mapping], tensor: int, pipeline: int
) -> list[int]:
    """Return the parameters of a rank of every stage."""
    stages = [0] * pipeline
    per_stage = architecture.num_layers // pipeline
    for mapping in mappings:
        count = mapping.parameter.numel() // (tensor if mapping.rule.axis is not None else 1)
        layer = re.search(r"decoder\.layers\.(\d+)\.", mapping.name)
        if layer is not None:
            stages[int(layer[1]) // per_stage] += count
        elif "output_layer" in mapping.name or "final_layernorm" in mapping.name:
            stages[-1] += count
        else:
            stages[0] += count
        if "word_embeddings" in mapping.name and architecture.tie_word_embeddings and pipeline > 1:
            # The last stage has a copy.
            stages[-1] += count
    return stages

"""What a Hugging Face folder says about its network: everything is read from config.json, nothing
from a table of sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.models.families.family import Architecture, LayerType, check_architecture
from zppo_mm.models.families.settings import read_config_file, read_settings, text_level
from zppo_mm.models.families.table import FAMILIES

__all__ = [
    "Architecture",
    "LayerType",
    "check_layout",
    "load_architecture",
    "parse_architecture",
    "split_sizes",
]


def load_architecture(hf_dir: str | Path) -> Architecture:
    """Read `config.json` of a Hugging Face folder.

    Raises:
        ModelError: The file is missing or no JSON, the family is not supported, or a setting is
            not.
    """
    path = Path(hf_dir) / "config.json"
    return parse_architecture(read_config_file(path), str(path))


def parse_architecture(raw: dict[str, Any], where: str = "config.json") -> Architecture:
    """Check a parsed config.json and name what the network needs.

    Args:
        raw: The parsed file.
        where: Its name in error messages.

    Raises:
        ModelError: The family is not supported, a key is missing, or a setting is not supported.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"{where}: model_type is not supported, got {name!r}, expected one of "
            f"{', '.join(FAMILIES)}; use a folder of one of these families, or add the family as "
            "docs/models.md says"
        )
    architecture = _read(raw, where)
    stray = text_level(raw)
    if (
        stray
        and _read({**raw, "text_config": {**raw["text_config"], **stray}}, where) != architecture
    ):
        raise ModelError(
            f"{where}: the language model is described twice, got other settings of it around "
            "text_config than inside, where transformers looks, expected one; correct or remove "
            f"what stands outside among {', '.join(stray)}"
        )
    return architecture


def _read(raw: dict[str, Any], where: str) -> Architecture:
    family = FAMILIES[raw["model_type"]]
    settings = read_settings(raw, where, family.title)
    try:
        architecture = family.read(settings)
    except KeyError as error:
        raise ModelError(
            f"{where}: the key {error} is missing, expected a complete {family.title} config; "
            "download it again"
        ) from error
    check_architecture(architecture, settings)
    return architecture


def split_sizes(architecture: Architecture) -> dict[str, int]:
    """Return by their names in config.json the numbers that a tensor size must divide."""
    sizes = {
        "num_key_value_heads": architecture.num_query_groups,
        "num_attention_heads": architecture.num_attention_heads,
        "linear_num_key_heads": architecture.linear_num_key_heads,
        "linear_num_value_heads": architecture.linear_num_value_heads,
        "intermediate_size": architecture.ffn_hidden_size,
        "vocab_size": architecture.vocab_size,
    }
    return {name: size for name, size in sizes.items() if size}


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Check that the network can be split over the tensor, context and pipeline ranks.

    Raises:
        ModelError: Heads, feed-forward width or vocabulary do not divide by the tensor size, heads
            not by tensor x context size, layers not by the pipeline size, or the first pipeline
            stage has fewer layers than get features of the media.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, value in split_sizes(architecture).items():
        if value % tensor:
            raise ModelError(
                f"parallel.tensor_model_parallel_size: {name} cannot be split, got {value} over "
                f"{tensor} ranks, expected a multiple of {tensor}; choose a tensor size that "
                f"divides it, at most {_nearest_tensor_size(architecture, tensor)} here"
            )
    _check_heads(architecture, tensor, parallel.context_parallel_size)
    if not _stages_fit(architecture, pipeline):
        layers, deepstack = architecture.num_layers, architecture.num_deepstack
        rule = f"a multiple of {pipeline}"
        if deepstack:
            rule += (
                f", at least {deepstack} in the first stage, whose layers get features of the media"
            )
        raise ModelError(
            f"parallel.pipeline_model_parallel_size: layers cannot be split, got {layers} over "
            f"{pipeline} stages, expected {rule}; choose "
            f"{_nearest_pipeline_size(architecture, pipeline)} stages"
        )


def _check_heads(architecture: Architecture, tensor: int, context: int) -> None:
    """Check that the context ranks can share the heads of a tensor rank."""
    heads = {
        name: size for name, size in split_sizes(architecture).items() if name.endswith("_heads")
    }
    for name, value in heads.items():
        if value % (tensor * context):
            nearest = max(
                size
                for size in range(1, context)
                if all(count % (tensor * size) == 0 for count in heads.values())
            )
            raise ModelError(
                f"parallel.context_parallel_size: {name} cannot be split, got {value} over tensor "
                f"{tensor} x context {context} ranks, expected a multiple of {tensor * context}; "
                f"choose a context size that divides {value // tensor}, at most {nearest} here"
            )


def _stages_fit(architecture: Architecture, pipeline: int) -> bool:
    layers = architecture.num_layers
    return layers % pipeline == 0 and layers // pipeline >= architecture.num_deepstack


def _nearest_tensor_size(architecture: Architecture, asked: int) -> int:
    """Return the largest tensor size below the one asked for that divides everything."""
    sizes = split_sizes(architecture).values()
    return max(size for size in range(1, asked) if all(value % size == 0 for value in sizes))


def _nearest_pipeline_size(architecture: Architecture, asked: int) -> int:
    return max(size for size in range(1, asked) if _stages_fit(architecture, size))

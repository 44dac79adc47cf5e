"""A folder loaded two ways, or two folders, compared: keys, types, values, and logits per kind of
prompt.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.conversion.prompts import ProbePrompt, probe_prompts
from zppo_mm.errors import ConfigError, ModelError
from zppo_mm.models.families.architecture import Architecture, load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.parity.oracle import open_model
from zppo_mm.text_table import text_table
from zppo_mm.weights.hf_export import in_rounds, open_source, stream_weights
from zppo_mm.weights.mapping import parameter_mappings
from zppo_mm.weights.megatron_folder import check_shapes, read_shard
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

MAX_LOGIT_DIFFERENCE = 1e-3
"""Relative to the largest logit. Float32 sums in another order differ by less than a tenth of it; a
misplaced tensor by far more.
"""
_NUM_NAMED = 3


@dataclass(slots=True)
class Report:
    """Rows of a comparison.

    Attributes:
        rows: What was compared, the finding, and whether that is as it should be.
    """

    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, what: str, finding: str, good: bool = True) -> None:
        self.rows.append((what, finding, good))

    @property
    def good(self) -> bool:
        """Whether nothing differs."""
        return all(good for _, _, good in self.rows)

    def text(self) -> str:
        """Return the table."""
        return text_table(
            ["compared", "finding", ""],
            [(what, finding, "ok" if good else "DIFFERS") for what, finding, good in self.rows],
            num_left=3,
        )


@dataclass(slots=True)
class ValueComparison:
    """Tensors of the same keys, bit by bit.

    Attributes:
        num_equal: Equal ones.
        different: Key and largest difference of the others.
        types: Key, found and expected type of those of another type.
        num_by_type: How many there are of every expected type.
    """

    num_equal: int = 0
    num_by_type: Counter[torch.dtype] = field(default_factory=Counter)
    different: list[tuple[str, float]] = field(default_factory=list)
    types: list[tuple[str, torch.dtype, torch.dtype]] = field(default_factory=list)

    def compare(self, key: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Take one pair."""
        self.num_by_type[expected.dtype] += 1
        if found.dtype != expected.dtype:
            self.types.append((key, found.dtype, expected.dtype))
        if found.shape != expected.shape:
            self.different.append((key, float("inf")))
        elif _same_values(found, expected):
            self.num_equal += 1
        else:
            self.different.append((key, float((found.double() - expected.double()).abs().max())))

    def add_to(self, report: Report) -> None:
        """Write the rows."""
        types = _named(
            f"{key} is {found}, expected {expected}" for key, found, expected in self.types
        )
        counted = ", ".join(
            f"{count} {str(dtype).removeprefix('torch.')}"
            for dtype, count in self.num_by_type.most_common()
        )
        report.add("types", types or counted, not self.types)
        different = _named(f"{key} differs by {gap:.3g}" for key, gap in self.different)
        report.add("values", different or f"{self.num_equal} equal bit for bit", not self.different)


def verify_folder(hf_dir: Path) -> Report:
    """Load a folder into the Megatron network and into transformers and compare both with the files
    and with each other.

    Raises:
        ModelError: The folder cannot be loaded at all.
        ConfigError: There is more than one process.
    """
    _refuse_launcher()
    report = Report()
    # Quantised weights are compared before they are rounded to any type, as both sides compute in
    # float32 here.
    source = SafetensorsFolder(hf_dir, torch.float32)
    architecture = load_architecture(hf_dir)
    prompts = probe_prompts(architecture, source)
    theirs = transformers_logits(hf_dir, architecture, prompts, report, torch.float32)
    layout = ParallelConfig()
    network = build_model(
        architecture,
        ModelConfig(transformer_impl="local", params_dtype="float32"),
        layout,
        trainable=False,
    )
    open_source(network, source)
    mappings = list(parameter_mappings(network))
    check_shapes(mappings, source, architecture)
    for mapping in mappings:
        mapping.parameter.copy_(read_shard(network, mapping, source))
    values = ValueComparison()
    mapped = stream_weights(
        network,
        in_rounds(mappings),
        source,
        lambda key, tensor: values.compare(key, tensor, source.read(key)),
        hf_dir,
    )
    report.add(
        "keys",
        f"{len(mapped)} in the network, {len(source.weight_map) - len(mapped)} passed through",
    )
    values.add_to(report)
    with torch.inference_mode():
        ours = [
            network(**prompt.network_inputs(parallel.device())).float().cpu() for prompt in prompts
        ]
    _compare_logits(prompts, ours, theirs, report)
    return report


def verify_folders(found_dir: Path, expected_dir: Path) -> Report:
    """Compare two folders: what is in the files, and what transformers computes with them.

    Raises:
        ModelError: A folder cannot be read.
        ConfigError: There is more than one process.
    """
    _refuse_launcher()
    report = Report()
    found, expected = SafetensorsFolder(found_dir), SafetensorsFolder(expected_dir)
    names = [set(folder.stored_names.values()) for folder in (found, expected)]
    only = {"first": sorted(names[0] - names[1]), "second": sorted(names[1] - names[0])}
    extra = _named(f"{key} is in the {name} only" for name, keys in only.items() for key in keys)
    report.add("keys", extra or f"{len(found.weight_map)} in both", not extra)
    values = ValueComparison()
    for key in found.weight_map:
        if key in expected.weight_map:
            values.compare(key, found.read(key), expected.read(key))
    values.add_to(report)
    architecture = load_architecture(found_dir)
    prompts = probe_prompts(architecture, found)
    # Folders that are plain and quantised agree in the type that the plain one was rounded to.
    dtype = torch.bfloat16 if found.is_quantised or expected.is_quantised else torch.float32
    logits = [
        transformers_logits(folder.path, architecture, prompts, report, dtype)
        for folder in (found, expected)
    ]
    _compare_logits(prompts, logits[0], logits[1], report)
    return report


def transformers_logits(
    hf_dir: Path,
    architecture: Architecture,
    prompts: list[ProbePrompt],
    report: Report,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Return what transformers computes in float32; adds a row about keys that it does
    not know.

    Args:
        hf_dir: A folder.
        architecture: Its network.
        prompts: What to compute.
        report: Gets the row.
        dtype: Type that the weights are loaded in, before they become float32.

    Returns:
        `[tokens, vocabulary]` per prompt.

    Raises:
        ModelError: transformers cannot load the folder.
    """
    try:
        model, info = open_model(hf_dir, dtype, has_vision=architecture.has_vision)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{hf_dir}: transformers cannot load it, got {type(error).__name__}: {error}, expected "
            "a folder that it opens; fix it, or install what the message names"
        ) from error
    known = (
        architecture.language_prefix,
        architecture.vision_prefix or architecture.language_prefix,
        "lm_head.",
    )
    wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    wrong += [
        f"{key} is not used" for key in sorted(info["unexpected_keys"]) if key.startswith(known)
    ]
    wrong += [f"{key} has another shape" for key in sorted(map(str, info["mismatched_keys"]))]
    report.add(
        f"keys in transformers, {hf_dir.name}",
        _named(wrong) or "all of the network found",
        not wrong,
    )
    model = model.to(parallel.device(), torch.float32).eval()
    with torch.inference_mode():
        logits = [
            model(**prompt.transformers_inputs(parallel.device())).logits[0].float().cpu()
            for prompt in prompts
        ]
    del model
    gc.collect()
    return logits


def _compare_logits(
    prompts: list[ProbePrompt],
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
    report: Report,
) -> None:
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        gap, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
        # Written so that a logit that is not a number fails.
        good = gap <= MAX_LOGIT_DIFFERENCE * scale
        report.add(
            f"logits, {prompt.kind}", f"{gap:.2e} at most, on logits up to {scale:.2f}", good
        )


def _refuse_launcher() -> None:
    if parallel.world_size() != 1:
        raise ConfigError(
            f"verify: compares in one process, got {parallel.world_size()} processes, expected 1; "
            "start it without a launcher"
        )


def _named(findings: Iterable[str]) -> str:
    """Return the first few findings and how many more there are."""
    listed = list(findings)
    more = f" and {len(listed) - _NUM_NAMED} more" if len(listed) > _NUM_NAMED else ""
    return "; ".join(listed[:_NUM_NAMED]) + more


def _same_values(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare bits where the type is the same, so that two equal values that are no numbers are
    equal.
    """
    if found.dtype != expected.dtype:
        return found.double().equal(expected.double())
    return (
        found.contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(expected.contiguous().reshape(-1).view(torch.uint8))
    )

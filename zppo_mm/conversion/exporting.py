"""An imported folder or a run's checkpoint to a Hugging Face folder, without a whole network in
memory.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from zppo_mm.config.load import load_config
from zppo_mm.config.schema import LoraConfig, ParallelConfig
from zppo_mm.conversion.choosing import Choice, choose_checkpoint
from zppo_mm.errors import ModelError
from zppo_mm.lora.adapters import add_lora
from zppo_mm.lora.checkpoint import load_adapters
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.processor import changed_processor_files, processor_overrides
from zppo_mm.run.build import student_folder
from zppo_mm.run_folder import RunFolder
from zppo_mm.training import checkpoint
from zppo_mm.weights.hf_export import agree, in_rounds, open_source, refuse_inside, write_weights
from zppo_mm.weights.imported_folder import ImportedFolder, is_imported
from zppo_mm.weights.mapping import parameter_mappings
from zppo_mm.weights.megatron_folder import build_without_weights, check_shapes, with_weights
from zppo_mm.weights.merge import merged_rounds
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)


def export_folder(
    source_dir: Path, target: Path, layout: ParallelConfig, choice: Choice = "newest"
) -> None:
    """Turn an imported folder, or a run's checkpoint, into a Hugging Face folder; every rank calls
    it.

    Args:
        source_dir: An imported folder, or a run's folder.
        target: The Hugging Face folder; an older one of that name is replaced.
        layout: How the work is split over processes; the result does not depend on it.
        choice: Which checkpoint of a run.

    Raises:
        ModelError: The folder is neither, its files are not usable, or files cannot be written;
            raised on every rank.
        CheckpointError: The weights cannot be loaded.
    """
    started = time.perf_counter()
    found = find_weights(source_dir, choice)
    model = build_without_weights(load_architecture(found.source.path), layout)
    add_lora(model, found.lora, seed=0)
    failure: Exception | None = None
    try:
        open_source(model, found.source)
        check_shapes(list(parameter_mappings(model)), found.source, model.architecture)
        refuse_inside(found.source, target)
    except ModelError as error:
        failure = error
    agree(failure, target)
    rounds = in_rounds(parameter_mappings(model))
    load_adapters(model, found.weights)
    weights = merged_rounds(
        model, with_weights(model, rounds, found.source, found.weights), found.source
    )
    write_weights(model, weights, found.source, target, found.changed_files)
    if parallel.rank() == 0:
        logger.info(
            "exported %s to %s in %.1f s", found.weights, target, time.perf_counter() - started
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """Where an export comes from.

    Attributes:
        weights: A distributed checkpoint.
        source: Decides what the exported folder must look like.
        lora: The run's adapters, which are merged.
        changed_files: Content of files, by name, that differ from the source's.
    """

    weights: Path
    source: SafetensorsFolder
    lora: LoraConfig = field(default_factory=LoraConfig)
    changed_files: dict[str, bytes] = field(default_factory=dict)


def find_weights(folder: Path, choice: Choice = "newest") -> Weights:
    """Return the checkpoint of an imported folder, or one of a run and the student it began with.

    Raises:
        ModelError: The folder is neither, or it is imported and a checkpoint of a run is chosen.
        CheckpointError: The run has no such checkpoint, or it is damaged.
    """
    if is_imported(folder):
        if choice != "newest":
            raise ModelError(
                f"{folder}: no run, got an imported folder, which has no steps, expected a run's "
                "folder with --step and --best; leave them out"
            )
        return Weights(folder, ImportedFolder(folder))
    run = RunFolder(folder)
    if not run.config.is_file():
        raise ModelError(
            f"{folder}: nothing to export, got no imported folder and no run with "
            f"{run.config.name}, expected one of them; check the path"
        )
    chosen = choose_checkpoint(run, choice)
    checkpoint.verify(chosen)
    config = load_config(run.config)
    student = student_folder(config.model)
    processor_files = changed_processor_files(student, processor_overrides(config.data))
    return Weights(chosen, SafetensorsFolder(student), config.lora, processor_files)

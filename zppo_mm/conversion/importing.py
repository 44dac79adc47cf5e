"""A Hugging Face folder into megatron-core's format, without a whole network in memory."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.hf_export import agree, is_writer, open_source, refuse_inside
from zppo_mm.weights.hf_writer import FolderWriter, aside_of
from zppo_mm.weights.imported_folder import begin_imported
from zppo_mm.weights.mapping import parameter_mappings, tied_copies
from zppo_mm.weights.megatron_folder import build_without_weights, check_shapes
from zppo_mm.weights.megatron_writer import save_from_hf
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)


def import_folder(hf_dir: Path, target: Path, layout: ParallelConfig) -> None:
    """Turn a Hugging Face folder into an imported folder; every rank calls it. An older folder of
    that name is replaced.

    Args:
        hf_dir: The folder; quantised weights become plain ones.
        target: The imported folder. It can be opened at any layout.
        layout: How the tensors in it are cut; loading at the same layout reads no byte too many.

    Raises:
        ModelError: The folder is not usable, its network cannot be split like this, or files cannot
            be written; raised on every rank.
        CheckpointError: The weights cannot be written.
    """
    started = time.perf_counter()
    model = build_without_weights(load_architecture(hf_dir), layout)
    mappings = list(parameter_mappings(model))
    source: SafetensorsFolder | None = None
    failure: Exception | None = None
    try:
        source = open_source(model, SafetensorsFolder(hf_dir))
        check_shapes(mappings, source, model.architecture)
        refuse_inside(source, target)
    except ModelError as error:
        failure = error
    agree(failure, target, "import")
    assert source is not None
    own = {key for mapping in mappings for key in mapping.keys} | set(
        tied_copies(model.architecture, source).values()
    )
    mapped = set().union(*parallel.gather_from_ranks(own))
    writer: FolderWriter | None = None
    try:
        if is_writer():
            writer = begin_imported(
                source, [key for key in source.weight_map if key not in mapped], target
            )
    except (OSError, ModelError) as error:
        failure = error
    agree(failure, target, "import")
    try:
        save_from_hf(model, source, aside_of(target))
        if writer is not None:
            try:
                writer.finish()
            except (OSError, ModelError) as error:
                failure = error
        agree(failure, target, "import")
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    if parallel.rank() == 0:
        kept = len(source.weight_map) - len(mapped)
        seconds = time.perf_counter() - started
        logger.info(
            "imported %s into %s: %d tensors and %d besides the network, %.1f s",
            hf_dir,
            target,
            len(mapped),
            kept,
            seconds,
        )

"""The network back to a Hugging Face folder: the source's keys, types and files, with this run's
weights.

Parameters travel one by one: gathered over tensor ranks, cut into Hugging Face tensors, sent to the
first rank, written at their offsets. No rank ever holds more than one whole parameter besides its
own shard of the network.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from zppo_mm.errors import ModelError
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.hf_writer import FolderWriter, other_files
from zppo_mm.weights.mapping import (
    Mapping,
    check_keys,
    join,
    parameter_mappings,
    split_tensors,
    tied_copies,
)
from zppo_mm.weights.merge import merged_rounds
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)

ROUND_BYTES = 1 << 28
"""Bytes of a rank's parameters between two checks that no rank has failed."""
Sink = Callable[[str, torch.Tensor], None]
"""Takes a Hugging Face key and its tensor, whole and on the CPU."""


def export_hf_weights(
    model: VisionLanguageModel,
    source_dir: str | Path,
    target_dir: str | Path,
    changed_files: dict[str, bytes] | None = None,
) -> None:
    """Write the network as a Hugging Face folder, its adapters merged; every rank calls it, one
    writes.

    The folder has the source's weight files, keys and types, weights outside the network unchanged,
    and every other file byte for byte, unless another content is given. A quantised source gives a
    folder that is not. It has a temporary name until it is complete; an older folder of that name
    is replaced.

    Args:
        model: This rank's stage.
        source_dir: The folder that the network's architecture came from.
        target_dir: The folder to write.
        changed_files: Content of files by name, instead of the source's.

    Raises:
        ModelError: The source does not fit the network, or writing failed on the writing rank;
            raised on every rank.
    """
    target = Path(target_dir)
    source: SafetensorsFolder | None = None
    failure: Exception | None = None
    try:
        source = open_source(model, SafetensorsFolder(source_dir))
        refuse_inside(source, target)
    except ModelError as error:
        failure = error
    # Agreed on before any tensor travels: a rank that stopped here would leave the others waiting.
    agree(failure, target)
    assert source is not None
    if is_writer():
        _warn_of_rounding(model, source)
    rounds = merged_rounds(model, in_rounds(parameter_mappings(model)), source)
    write_weights(model, rounds, source, target, changed_files)


def _warn_of_rounding(model: VisionLanguageModel, source: SafetensorsFolder) -> None:
    """Say that the folder's types hold less than the weights that were trained, with which the run
    sampled.
    """
    trained = [
        (key, each.parameter.dtype)
        for each in parameter_mappings(model)
        if each.parameter.requires_grad
        for key in each.keys
    ]
    rounded = [
        (key, dtype, source.dtype(key))
        for key, dtype in trained
        if source.dtype(key).itemsize < dtype.itemsize
    ]
    if rounded:
        key, dtype, coarser = rounded[0]
        logger.warning(
            "export: %d trained tensors, the first %s, are rounded from %s to %s, their type in "
            "the folder that the run started from; what training changed by less than half a step "
            "of that type is lost",
            len(rounded),
            key,
            str(dtype).removeprefix("torch."),
            str(coarser).removeprefix("torch."),
        )


def open_source(model: VisionLanguageModel, source: SafetensorsFolder) -> SafetensorsFolder:
    """Check that a folder fits this rank's stage and can be read; returns it.

    Raises:
        ModelError: A key is missing or not known, or a tensor's type is not supported.
    """
    check_keys(model, source)
    for key in source.weight_map:
        source.dtype(key)
    return source


def in_rounds(mappings: Iterable[Mapping]) -> list[list[Mapping]]:
    """Cut this stage's parameters into rounds of limited size, as many on every rank; every rank
    calls it.

    The embedding's copy on the last stage is left out: no file holds it.
    """
    rounds: list[list[Mapping]] = []
    room = 0
    for mapping in mappings:
        if mapping.copied_from_embedding:
            continue
        size = mapping.parameter.numel() * mapping.parameter.element_size()
        if not rounds or size > room:
            rounds.append([])
            room = ROUND_BYTES
        rounds[-1].append(mapping)
        room -= size
    most = max(parallel.gather_from_ranks(len(rounds)))
    return rounds + [[] for _ in range(most - len(rounds))]


def write_weights(
    model: VisionLanguageModel,
    rounds: Iterable[Sequence[Mapping]],
    source: SafetensorsFolder,
    target: Path,
    changed_files: dict[str, bytes] | None = None,
) -> None:
    """Write parameters, and what the source has besides them, as a Hugging Face folder; every rank
    calls it, one writes.

    Args:
        model: This rank's stage.
        rounds: From `in_rounds`, with weights; they may be made one after another.
        source: A checked folder.
        target: The folder to write.
        changed_files: Content of files by name, instead of the source's.

    Raises:
        ModelError: Writing failed on the writing rank; raised on every rank.
    """
    writer: FolderWriter | None = None
    failure: Exception | None = None
    try:
        writer = (
            FolderWriter(
                target, source.plain_headers(), {**other_files(source), **(changed_files or {})}
            )
            if is_writer()
            else None
        )
    except (OSError, ModelError) as error:
        failure = error
    agree(failure, target)
    try:
        sink = functools.partial(_write_stored, writer, source) if writer is not None else None
        written = stream_weights(model, rounds, source, sink, target)
        if writer is not None:
            try:
                for key in source.weight_map:
                    if key not in written:
                        _write_stored(writer, source, key, source.read(key))
                writer.finish()
            except (OSError, ModelError) as error:
                failure = error
        agree(failure, target)
    except BaseException:
        if writer is not None:
            writer.discard()
        raise


def _write_stored(
    writer: FolderWriter, source: SafetensorsFolder, key: str, tensor: torch.Tensor
) -> None:
    """Write a tensor under the name that the source has for it."""
    writer.write(source.stored_names[key], tensor)


@torch.no_grad()
def stream_weights(
    model: VisionLanguageModel,
    rounds: Iterable[Sequence[Mapping]],
    source: SafetensorsFolder,
    sink: Sink | None,
    target: Path,
) -> set[str]:
    """Hand every parameter's Hugging Face tensors to the first rank, in the source's types; every
    rank calls it.

    Args:
        model: This rank's stage.
        rounds: As `write_weights` takes them.
        source: Has the types and shapes.
        sink: Called once per key; only the writing rank's is.
        target: Where the tensors go, for messages.

    Returns:
        The keys that were written; none but on the writing rank.

    Raises:
        ModelError: A sink failed; raised on every rank after the round.
    """
    done: set[str] = set()
    for mappings in rounds:
        agree(_take_round(model, mappings, source, sink, done), target)
    return done


def _take_round(
    model: VisionLanguageModel,
    mappings: Sequence[Mapping],
    source: SafetensorsFolder,
    sink: Sink | None,
    done: set[str],
) -> Exception | None:
    """Hand over one round, of which nothing is held afterwards; returns what went wrong on this
    rank.

    A sink that failed is not asked again, but what the other ranks still send is taken: they wait
    for that.
    """
    failure: Exception | None = None
    for key, tensor in _with_copies(_arriving(model, mappings, source), model, source):
        done.add(key)
        if sink is not None and failure is None:
            try:
                sink(key, tensor)
            except (OSError, ModelError) as error:
                failure = error
    return failure


def _with_copies(
    tensors: Iterator[tuple[str, torch.Tensor]],
    model: VisionLanguageModel,
    source: SafetensorsFolder,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors, and after a tied embedding the output layer that the source has besides."""
    copies = tied_copies(model.architecture, source)
    for key, tensor in tensors:
        yield key, tensor
        if key in copies:
            yield copies[key], tensor.to(source.dtype(copies[key]))


def is_writer() -> bool:
    """Return whether this is the rank that writes: the first of the first replica."""
    return _is_first_replica() and parallel.tensor_rank() == 0 and parallel.is_first_stage()


def agree(failure: Exception | None, target: Path, what: str = "export") -> None:
    """Wait for every rank, or fail on every rank.

    Args:
        failure: What went wrong on this rank.
        target: The folder that is written.
        what: Is done, for the message.

    Raises:
        ModelError: It failed on at least one.
    """
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if failure is None else str(failure))
    reasons = [report for report in reports if report is not None]
    if reasons:
        raise ModelError(
            f"{target}: the {what} failed, got {json.dumps(reasons[0])}, expected a complete "
            f"folder; correct the cause and {what} again"
        )


def _is_first_replica() -> bool:
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True)) == 0


def _arriving(
    model: VisionLanguageModel, mappings: Sequence[Mapping], source: SafetensorsFolder
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all stages' tensors on the writing rank and nothing on the others, which send theirs
    meanwhile.
    """
    if not _is_first_replica():
        return
    group = parallel.pipeline_group()
    keys: list[list[str]] = [[] for _ in range(parallel.pipeline_size())]
    dist.all_gather_object(keys, [key for mapping in mappings for key in mapping.keys], group=group)
    for key, tensor in _whole_tensors(model, mappings, source):
        if is_writer():
            yield key, tensor
        elif parallel.tensor_rank() == 0:
            dist.send(tensor.to(parallel.device()), dist.get_global_rank(group, 0), group=group)
    if not is_writer():
        return
    for stage in range(1, len(keys)):
        for key in keys[stage]:
            buffer = torch.empty(
                source.shape(key), dtype=source.dtype(key), device=parallel.device()
            )
            dist.recv(buffer, dist.get_global_rank(group, stage), group=group)
            yield key, buffer.cpu()


def _whole_tensors(
    model: VisionLanguageModel, mappings: Sequence[Mapping], source: SafetensorsFolder
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield Hugging Face tensors, whole, on the CPU and in the source's types; the tensor ranks of
    the stage go through it together.
    """
    group = parallel.tensor_group()
    for mapping in mappings:
        shard = mapping.parameter.detach().contiguous()
        shards = [shard]
        if mapping.rule.axis is not None and group.size() > 1:
            shards = [torch.empty_like(shard) for _ in range(group.size())]
            dist.all_gather(shards, shard, group=group)
        whole = join(shards, mapping, model.architecture)
        for key, tensor in zip(
            mapping.keys, split_tensors(whole, mapping.rule, model.architecture), strict=True
        ):
            yield key, tensor.to("cpu", source.dtype(key)).contiguous()


def refuse_inside(source: SafetensorsFolder, target: Path) -> None:
    """Copying a folder into itself would never end.

    Raises:
        ModelError: The target is inside the source.
    """
    if source.path.resolve() in target.resolve().parents:
        raise ModelError(
            f"{target}: lies inside the source folder {source.path}, expected a folder beside it; "
            "choose another folder"
        )

"""The network back to a Hugging Face folder: the source's keys, types and files, with this run's weights."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from zppo_mm.errors import ModelError
from zppo_mm.models.safetensors_folder import SafetensorsFolder
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.models.weights import check_keys, join, parameter_mappings, split_tensors

_INCOMPLETE = ".incomplete"
_REPLACED = ".replaced"


@torch.no_grad()
def export_hf_weights(model: VisionLanguageModel, source_dir: str | Path, target_dir: str | Path) -> None:
    """Write the network as a Hugging Face folder; every rank calls it, one writes.

    The folder has the source's weight files, keys and types, weights outside the network unchanged, and every other file byte for byte. It
    is written aside and renamed when complete; an older folder of that name is replaced.

    Args:
        model: This rank's stage.
        source_dir: The folder that the network's architecture came from.
        target_dir: The folder to write.

    Raises:
        ModelError: The source does not fit the network, or writing failed on the writing rank; raised on every rank.
    """
    target = Path(target_dir)
    failure: Exception | None
    source, failure = _open_source(model, source_dir)
    # Agreed on before any tensor travels: a rank that stopped here would leave the others waiting.
    _agree(failure, target)
    assert source is not None
    if parallel_state.get_data_parallel_rank() == 0:
        weights = _collect(_own_weights(model, source), source)
        if parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            try:
                _write_folder(weights, source, target)
            except (OSError, ModelError) as error:
                failure = error
    _agree(failure, target)


def _open_source(model: VisionLanguageModel, source_dir: str | Path) -> tuple[SafetensorsFolder | None, ModelError | None]:
    """Return the source folder, or what is wrong with it for this rank's stage."""
    try:
        source = SafetensorsFolder(source_dir)
        check_keys(model, source)
        for key in source.places:
            source.dtype(key)
    except ModelError as error:
        return None, error
    return source, None


def _own_weights(model: VisionLanguageModel, source: SafetensorsFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this stage's tensors under their Hugging Face keys, whole, on the CPU and in the source's types."""
    group = parallel_state.get_tensor_model_parallel_group()
    for mapping in parameter_mappings(model):
        if mapping.copied_from_embedding:
            continue
        share = mapping.parameter.detach().contiguous()
        shares = [share]
        if mapping.rule.axis is not None and group.size() > 1:
            shares = [torch.empty_like(share) for _ in range(group.size())]
            dist.all_gather(shares, share, group=group)
        whole = join(shares, mapping, model.architecture)
        for key, tensor in zip(mapping.keys, split_tensors(whole, mapping.rule, model.architecture), strict=True):
            yield key, tensor.to("cpu", source.dtype(key)).contiguous()


def _collect(own: Iterator[tuple[str, torch.Tensor]], source: SafetensorsFolder) -> dict[str, torch.Tensor]:
    """Bring all stages' tensors to the first; the other stages and tensor ranks keep none."""
    group = parallel_state.get_pipeline_model_parallel_group()
    stage, num_stages = parallel_state.get_pipeline_model_parallel_rank(), group.size()
    speaks = parallel_state.get_tensor_model_parallel_rank() == 0
    first = dist.get_global_rank(group, 0)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    weights: dict[str, torch.Tensor] = {}
    keys: list[str] = []
    for key, tensor in own:
        keys.append(key)
        if speaks:
            weights[key] = tensor
    if num_stages == 1 or not speaks:
        return weights
    all_keys: list[list[str]] = [[] for _ in range(num_stages)]
    dist.all_gather_object(all_keys, keys, group=group)
    if stage > 0:
        for key in keys:
            dist.send(weights.pop(key).to(device), first, group=group)
        return {}
    for sender in range(1, num_stages):
        for key in all_keys[sender]:
            buffer = torch.empty(source.shape(key), dtype=source.dtype(key), device=device)
            dist.recv(buffer, dist.get_global_rank(group, sender), group=group)
            weights[key] = buffer.cpu()
    return weights


def _write_folder(weights: dict[str, torch.Tensor], source: SafetensorsFolder, target: Path) -> None:
    aside = target.with_name(target.name + _INCOMPLETE)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in sorted(source.path.rglob("*")):
        relative = file.relative_to(source.path)
        if file.is_dir():
            (aside / relative).mkdir(parents=True, exist_ok=True)
        elif str(relative) not in source.files:
            shutil.copyfile(file, aside / relative)
    for name in source.files:
        tensors = {key: weights[key] if key in weights else source.read(key) for key in source.keys_of(name)}
        _save_file(tensors, aside / name, source.metadata_of(name) or {"format": "pt"})
    _replace(aside, target)


def _save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one weight file that may be read by whom the umask lets read; safetensors itself leaves it to its owner alone."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def _replace(aside: Path, target: Path) -> None:
    """Put a complete folder in the place of an older one; there is always one of the two under some name."""
    replaced = target.with_name(target.name + _REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.replace(target, replaced)
    os.replace(aside, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _agree(failure: Exception | None, target: Path) -> None:
    """Wait until the folder is there, or fail on every rank."""
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if failure is None else str(failure))
    reasons = [report for report in reports if report is not None]
    if reasons:
        raise ModelError(
            f"{target}: the export failed, got {json.dumps(reasons[0])}, expected a complete folder; correct the cause and export again"
        )

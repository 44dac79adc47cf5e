"""Adapters as a PEFT folder: whole A's and B's under the names that `peft` gives them on the
transformers model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data.atomic_files import new_folder
from zppo_mm.errors import ModelError
from zppo_mm.lora.adapters import LoraAdapters, adapters_of, target_names
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class _Shard:
    """A rank's part of an A or a B.

    Attributes:
        key: PEFT's.
        axis: Along which the ranks' parts are split; `None` if every rank has the whole.
        indices: `[n]` int64, of this part along the axis.
    """

    key: str
    axis: int | None
    indices: torch.Tensor
    tensor: torch.Tensor


def export_adapter(
    model: VisionLanguageModel, source_dir: str | Path, target_dir: str | Path
) -> None:
    """Write the adapters as a folder that `peft` loads onto the source's transformers model; every
    rank calls it, rank 0 writes.

    Args:
        model: This rank's stage, with adapters.
        source_dir: The folder that the frozen weights came from; named in the adapter's
            configuration.
        target_dir: The folder to write; an older one of that name is replaced.

    Raises:
        ModelError: The adapters alone are not what was trained, or writing failed; raised on every
            rank.
    """
    adapters = adapters_of(model)
    assert adapters is not None, "only a network with adapters has an adapter folder"
    target = Path(target_dir)
    if adapters.config.also_train:
        raise ModelError(
            f"{target}: the adapters alone are not what was trained, got "
            f"lora.also_train={adapters.config.also_train}, expected none; use the merged folder"
        )
    tensors = _gather(model, adapters)
    failure = None
    if parallel.rank() == 0:
        try:
            _write(target, tensors, _configuration(model, adapters, str(source_dir), tensors))
        except OSError as error:
            failure = str(error)
    failure = parallel.broadcast_object(failure or "")
    if failure:
        raise ModelError(
            f"{target}: the export failed, got {failure}, expected room and permission; correct "
            "the cause and export again"
        )


def _gather(model: VisionLanguageModel, adapters: LoraAdapters) -> dict[str, torch.Tensor]:
    """Return all A's and B's, whole and on the CPU, on rank 0; nothing on the others."""
    mine = _shards(model, adapters) if parallel.replica_rank() == 0 else []
    gathered: list[Any] | None = [None] * parallel.world_size() if parallel.rank() == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    whole: dict[str, torch.Tensor] = {}
    for shards in gathered or ():
        for shard in shards:
            if shard.axis is None:
                whole[shard.key] = shard.tensor
                continue
            shape = list(shard.tensor.shape)
            shape[shard.axis] *= parallel.tensor_size()
            whole.setdefault(shard.key, torch.empty(shape, dtype=shard.tensor.dtype)).index_copy_(
                shard.axis, shard.indices, shard.tensor
            )
    return whole


def _shards(model: VisionLanguageModel, adapters: LoraAdapters) -> list[_Shard]:
    shards = []
    for branch in adapters.branches.values():
        cuts_rows = branch.mapping.rule.axis == 0
        for target in branch.targets:
            name = _PEFT_PREFIX + target.key.removesuffix(".weight")
            a, b = (
                parameter.detach().cpu().contiguous()
                for parameter in (target.lora_A, target.lora_B)
            )
            shards.append(
                _Shard(f"{name}.lora_A.weight", None if cuts_rows else 1, target.columns, a)
            )
            shards.append(_Shard(f"{name}.lora_B.weight", 0 if cuts_rows else None, target.rows, b))
    return shards


def _configuration(
    model: VisionLanguageModel,
    adapters: LoraAdapters,
    source: str,
    tensors: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    config = adapters.config
    names = sorted(target_names(config, model.architecture))
    tower = (
        {name.rpartition(".")[2] for name, _module in model.vision.named_modules()}
        if model.vision is not None
        else set()
    )
    if tower & set(names):
        # PEFT would adapt the tower's linears of the same names, so the adapted ones are listed one
        # by one.
        names = sorted({key.removeprefix(_PEFT_PREFIX).rpartition(".lora_")[0] for key in tensors})
    return {
        "peft_type": "LORA",
        # None: PEFT's classes for a task know text models alone.
        "task_type": None if model.architecture.has_vision else "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _write(target: Path, tensors: dict[str, torch.Tensor], configuration: dict[str, Any]) -> None:
    with new_folder(target, replace=True) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(
            json.dumps(configuration, indent=2) + "\n", encoding="utf-8"
        )
        # The writer of weights leaves files to their owner alone.
        (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)

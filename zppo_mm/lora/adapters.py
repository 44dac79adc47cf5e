"""LoRA on the language model: low-rank branches beside Megatron's linears, one A and one B for
every Hugging Face module.

A Megatron linear holds several Hugging Face modules in rows of its own order. The branches of one
linear share its input, and the rows of their B's are permuted into its order on every use, so that
what is trained is exactly what PEFT would train, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import nn

from zppo_mm.config.schema import LORA_TARGETS, LoraConfig
from zppo_mm.errors import ConfigError
from zppo_mm.lora.branch import LoraBranch, LoraTarget
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.megatron_versions import split_sharded_tensor
from zppo_mm.weights.mapping import (
    Mapping,
    cut,
    known_language_keys,
    parameter_mappings,
    split_tensors,
)


class LoraAdapters(nn.Module):
    """All adapters of this rank's stage, `layers.{global number}.{Hugging Face name}.lora_A` and
    `lora_B`.

    They are kept beside the language model, not inside it: names, checkpoints and loading of the
    frozen network stay as they are.

    Args:
        model: This rank's stage.
        config: Rank, scale, dropout, targets.
        seed: The run's seed; each A draws from a stream of its own name.

    Attributes:
        config: As given.
        branches: By the name of the Megatron weight.
    """

    def __init__(self, model: VisionLanguageModel, config: LoraConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict()
        self.branches: dict[str, LoraBranch] = {}
        self._architecture = model.architecture
        wanted = target_names(config, model.architecture)
        for mapping in list(parameter_mappings(model)):
            # A vision tower may have linears of the same names.
            if mapping.name.startswith("language_model.") and any(
                _is_target(key, wanted) for key in mapping.keys
            ):
                self.branches[mapping.name] = self._branch(model, mapping, wanted, seed)

    def _branch(
        self, model: VisionLanguageModel, mapping: Mapping, wanted: set[str], seed: int
    ) -> LoraBranch:
        rank, size, weight = parallel.tensor_rank(), parallel.tensor_size(), mapping.parameter
        # Column-parallel linears cut rows (outputs), so B; row-parallel ones cut columns, so A.
        cuts_rows = mapping.rule.axis == 0
        num_rows, num_inputs = (
            weight.shape[0] * (size if cuts_rows else 1),
            weight.shape[1] * (1 if cuts_rows else size),
        )
        columns = (
            torch.arange(num_inputs) if cuts_rows else torch.arange(num_inputs).chunk(size)[rank]
        )
        # Row numbers, cut and split as the weight is, say which rows of each B this rank has and
        # where they are in its fused linear.
        whole_rows = torch.arange(num_rows)
        here = cut(whole_rows, mapping, self._architecture, rank, size) if cuts_rows else whole_rows
        row_here = torch.full((num_rows,), -1).index_copy(0, here, torch.arange(len(here)))
        targets: list[LoraTarget] = []
        rows_here: list[torch.Tensor] = []
        for key, fused in zip(
            mapping.keys, split_tensors(whole_rows, mapping.rule, self._architecture), strict=True
        ):
            if _is_target(key, wanted):
                # `fused`: rows of this Hugging Face module in the whole Megatron weight.
                rows = (row_here[fused] >= 0).nonzero().squeeze(1)
                target = LoraTarget(key, weight, self.config.rank, rows, columns, num_inputs, seed)
                targets.append(target)
                rows_here.append(row_here[fused[rows]])
                self._keep(key, target)
        # From the concatenated B's to the rows of the linear; rows without adapter point behind the
        # last.
        order = torch.full((len(here),), sum(map(len, rows_here)))
        order[torch.cat(rows_here)] = torch.arange(len(torch.cat(rows_here)))
        unchanged = torch.equal(order, torch.arange(len(here)))
        linear = model.get_submodule(mapping.name.removesuffix(".weight"))
        # In a network without memory the row order still counts: its adapters may be read from a
        # checkpoint.
        placed = None if unchanged else order if weight.is_meta else order.to(weight.device)
        return LoraBranch(
            linear, mapping, targets, placed, self.config, model.config.sequence_parallel
        )

    def _keep(self, key: str, target: LoraTarget) -> None:
        *_, number, _block, name, _weight = key.split(".")
        if number not in self.layers:
            self.layers[number] = nn.ModuleDict()
        cast(nn.ModuleDict, self.layers[number])[name] = target

    def targets(self) -> Iterator[LoraTarget]:
        """Yield every adapted module of this stage."""
        for branch in self.branches.values():
            yield from branch.targets

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> ShardedStateDict:
        """Describe the parameters for distributed checkpointing, under names and in pieces that do
        not depend on the layout.
        """
        groups = {
            "tp_group": parallel.tensor_group(),
            "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        }
        # Hugging Face's names and global layer numbers: the same keys for every pipeline layout.
        names = {id(module): name for name, module in self.named_modules()}
        result: ShardedStateDict = {}
        for branch in self.branches.values():
            split = "lora_B" if branch.mapping.rule.axis == 0 else "lora_A"
            for target in branch.targets:
                start = f"{prefix}{names[id(target)]}."
                own = {"lora_A": target.lora_A, "lora_B": target.lora_B}
                result.update(
                    make_sharded_tensors_for_checkpoint(
                        own, start, {split: branch.mapping.rule.axis}, sharded_offsets, **groups
                    )
                )
                if target.key.endswith("in_proj_qkv.weight"):
                    # Each part is cut by itself, so it is saved by itself.
                    name = start + "lora_B"
                    result[name] = split_sharded_tensor(
                        result[name], self._delta_net_parts(), ["query", "key", "value"], 0
                    )
        return result

    def _delta_net_parts(self) -> list[int]:
        size, network = parallel.tensor_size(), self._architecture
        key = network.linear_num_key_heads * network.linear_key_head_dim // size
        return [key, key, network.linear_num_value_heads * network.linear_value_head_dim // size]


def add_lora(model: VisionLanguageModel, config: LoraConfig, seed: int) -> None:
    """Freeze the network but for `lora.also_train` and put adapters on the language model; does
    nothing at rank 0.

    Without training the adapters change nothing: every B is zero.

    Args:
        model: This rank's stage, weights loaded.
        config: Rank, scale, dropout, targets, what else trains.
        seed: The run's seed.

    Raises:
        ConfigError: A target is not in this network, or a part that is to train is not.
    """
    if not config.rank:
        return
    if config.also_train and not model.architecture.has_vision:
        raise ConfigError(
            f"lora.also_train: the network has no vision tower, got {config.also_train}, expected "
            "an empty list; remove the key"
        )
    apart = target_names(config, model.architecture) & {"in_proj_a", "in_proj_b"}
    if model.config.fp8 and apart:
        raise ConfigError(
            f"lora.targets: not under FP8, got {', '.join(sorted(apart))}, expected others: these "
            "are computed apart from their linear there, without its adapters; name the targets "
            "one by one and leave these out"
        )
    # Before the optimizer and DDP are built: they take what requires a gradient.
    model.requires_grad_(False)
    for part in config.also_train:
        for parameter in model.parameters_of(part):
            parameter.requires_grad_(True)
    cast(Any, model).lora = LoraAdapters(model, config, seed)
    if model.config.recompute_granularity == "full" or parallel.pipeline_size() > 1:
        model.language_model.decoder.register_forward_pre_hook(_require_gradient, with_kwargs=True)


def adapters_of(model: nn.Module) -> LoraAdapters | None:
    """Return the adapters of a network, `None` if it has none."""
    return cast("LoraAdapters | None", getattr(model, "lora", None))


def target_names(config: LoraConfig, architecture: Architecture) -> set[str]:
    """Return the Hugging Face names of the adapted modules.

    Raises:
        ConfigError: The network has no module of a name.
    """
    present = {
        name
        for name in LORA_TARGETS
        if any(_is_target(key, {name}) for key in known_language_keys(architecture))
    }
    if config.targets == ["all"]:
        return present
    missing = [name for name in config.targets if name not in present]
    if missing:
        raise ConfigError(
            f"lora.targets: not in this network, got {missing[0]!r}, expected any of "
            f"{', '.join(name for name in LORA_TARGETS if name in present)}, or all; correct the "
            "list"
        )
    return set(config.targets)


def _is_target(key: str, names: set[str]) -> bool:
    """Return whether a key is the weight of a decoder layer's linear of one of these names."""
    parts = key.split(".")
    return len(parts) > 4 and parts[-4].isdigit() and parts[-2] in names and parts[-1] == "weight"


def _require_gradient(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Have gradients reach a stage's input although the embedding is frozen.

    Recomputation passes no gradient to anything inside a block whose input needs none, and a
    pipeline stage is asked for the gradient of its output even if nothing in it is adapted.
    """
    hidden = kwargs.get("hidden_states")
    if hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
        kwargs["hidden_states"] = hidden.detach().requires_grad_()
    return args, kwargs

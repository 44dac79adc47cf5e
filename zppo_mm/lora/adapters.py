"""LoRA on the language model: low-rank branches beside Megatron's linears, one A and one B for
every Hugging Face module.

A Megatron linear holds several Hugging Face modules in rows of its own order. The branches of one
linear share its input, and their B's are laid into those rows when they are used, so that what is
trained is exactly what PEFT would train, whatever the layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import nn

from zppo_mm.config.schema import LORA_TARGETS, LoraConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.adapted import DecodeAdapters
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


class LoraTarget(nn.Module):
    """A and B of one Hugging Face linear, this rank's share of each.

    Attributes:
        key: The linear's key in the weight files.
        rows: `[rows of B here]` int64, which rows of the whole B these are.
        columns: `[columns of A here]` int64, the same for A.
        lora_A: `[rank, inputs]`.
        lora_B: `[outputs, rank]`, zero at first.
    """

    def __init__(
        self,
        key: str,
        weight: torch.Tensor,
        rank: int,
        rows: torch.Tensor,
        columns: torch.Tensor,
        num_inputs: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.key = key
        self.rows = rows
        self.columns = columns
        whole = _initial_a(key, rank, num_inputs, seed)
        self.lora_A = nn.Parameter(whole[:, columns].to(weight.device, weight.dtype))
        self.lora_B = nn.Parameter(
            torch.zeros(len(rows), rank, device=weight.device, dtype=weight.dtype)
        )


class LoraBranch:
    """What is added to the output of one Megatron linear.

    Args:
        linear: The linear; its weight is frozen.
        mapping: Of its weight.
        targets: The adapted modules among the Hugging Face modules of the weight, in its order.
        order: `[rows]` int64, for each row of the linear its row among the targets' B's end to end,
            or the row after the last for a row without adapter; `None` where that changes nothing.
        config: Scale and dropout.
        sequence_parallel: Whether the tokens of a column-parallel linear's input, and of a
            row-parallel one's output, are shared.
    """

    def __init__(
        self,
        linear: nn.Module,
        mapping: Mapping,
        targets: list[LoraTarget],
        order: torch.Tensor | None,
        config: LoraConfig,
        sequence_parallel: bool,
    ) -> None:
        self.linear = linear
        self.mapping = mapping
        self.targets = targets
        self._order = order
        self._config = config
        self._sequence_parallel = sequence_parallel
        self._cuts_rows = mapping.rule.axis == 0
        self._mark_gradients()
        linear.register_forward_hook(self._add_to_output)

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return what this rank's weight changes by, float32 `[rows, inputs]`."""
        return self._scale * self._stacked_b().float() @ self._stacked_a().float()

    @torch.no_grad()
    def for_decoding(self) -> DecodeAdapters:
        """Return the adapters as they are now."""
        return DecodeAdapters(self._stacked_a(), self._stacked_b(), self._scale)

    @property
    def _scale(self) -> float:
        return self._config.alpha / self._config.rank

    def _mark_gradients(self) -> None:
        """Tell Megatron which halves are cut over the tensor ranks, and how the gradients of the
        others come together.

        A replicated half sees this rank's tokens alone under sequence parallelism, so its gradients
        are summed. Otherwise they are equal but for the order in which a GPU adds; averaged, the
        copies can never drift apart.
        """
        for target in self.targets:
            split, whole = (
                (target.lora_B, target.lora_A)
                if self._cuts_rows
                else (target.lora_A, target.lora_B)
            )
            cast(Any, split).tensor_model_parallel = True
            name = (
                "sequence_parallel"
                if self._sequence_parallel
                else "average_gradients_across_tp_domain"
            )
            setattr(whole, name, True)

    def _add_to_output(
        self, linear: nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Be the forward hook of the linear."""
        result, bias = output
        return result + self._run(inputs[0]), bias

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        if hasattr(self.linear, "layer_norm_weight"):
            hidden = self._normalise(hidden)
        if self._config.dropout and self.linear.training:
            hidden = self._drop(hidden)
        narrow = F.linear(hidden, self._stacked_a())
        # Between A and B there are few channels, so that is where the tensor ranks talk to one
        # another.
        if self._cuts_rows:
            if self._sequence_parallel:
                narrow = gather_from_sequence_parallel_region(
                    narrow, tensor_parallel_output_grad=True
                )
            else:
                narrow = copy_to_tensor_model_parallel_region(narrow)
        elif self._sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow)
        return F.linear(narrow * self._scale, self._stacked_b())

    def _normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """Repeat the norm that Transformer Engine keeps inside the linear behind it."""
        linear = cast(Any, self.linear)
        scale = linear.layer_norm_weight.float() + float(
            linear.config.layernorm_zero_centered_gamma
        )
        return F.rms_norm(hidden.float(), scale.shape, scale, linear.config.layernorm_epsilon).to(
            hidden.dtype
        )

    def _drop(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drop inputs: the same ones on all tensor ranks if they hold the same input, each its own
        if they share it.
        """
        if parallel.tensor_size() > 1 and (self._sequence_parallel or not self._cuts_rows):
            with get_cuda_rng_tracker().fork():
                return F.dropout(hidden, self._config.dropout)
        return F.dropout(hidden, self._config.dropout)

    def _stacked_a(self) -> torch.Tensor:
        """Return all A's, `[sum of ranks, inputs]`."""
        return torch.cat([target.lora_A for target in self.targets])

    def _stacked_b(self) -> torch.Tensor:
        """Return all B's in the rows and columns where their outputs and A's are, zero elsewhere:
        `[rows, sum of ranks]`.
        """
        rank, last = self._config.rank, len(self.targets) - 1
        blocks = [
            F.pad(target.lora_B, (place * rank, (last - place) * rank))
            for place, target in enumerate(self.targets)
        ]
        if self._order is None:
            return torch.cat(blocks)
        blocks.append(blocks[0].new_zeros((1, (last + 1) * rank)))
        return torch.cat(blocks).index_select(0, self._order)


class LoraAdapters(nn.Module):
    """All adapters of this rank's stage, `layers.{global number}.{Hugging Face name}.lora_A` and
    `lora_B`.

    They stand beside the language model, not inside it: names, checkpoints and loading of the
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
        cuts_rows = mapping.rule.axis == 0
        num_rows, num_inputs = (
            weight.shape[0] * (size if cuts_rows else 1),
            weight.shape[1] * (1 if cuts_rows else size),
        )
        columns = (
            torch.arange(num_inputs) if cuts_rows else torch.arange(num_inputs).chunk(size)[rank]
        )
        whole_rows = torch.arange(num_rows)
        here = cut(whole_rows, mapping, self._architecture, rank, size) if cuts_rows else whole_rows
        place = torch.full((num_rows,), -1).index_copy(0, here, torch.arange(len(here)))
        targets: list[LoraTarget] = []
        places: list[torch.Tensor] = []
        for key, fused in zip(
            mapping.keys, split_tensors(whole_rows, mapping.rule, self._architecture), strict=True
        ):
            if _is_target(key, wanted):
                rows = (place[fused] >= 0).nonzero().squeeze(1)
                target = LoraTarget(key, weight, self.config.rank, rows, columns, num_inputs, seed)
                targets.append(target)
                places.append(place[fused[rows]])
                self._keep(key, target)
        order = torch.full((len(here),), sum(map(len, places)))
        order[torch.cat(places)] = torch.arange(len(torch.cat(places)))
        unchanged = torch.equal(order, torch.arange(len(here)))
        linear = model.get_submodule(mapping.name.removesuffix(".weight"))
        # In a network without memory the places still count: its adapters may be read from a
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
        place = {
            "tp_group": parallel.tensor_group(),
            "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        }
        names = {id(module): name for name, module in self.named_modules()}
        result: ShardedStateDict = {}
        for branch in self.branches.values():
            split = "lora_B" if branch.mapping.rule.axis == 0 else "lora_A"
            for target in branch.targets:
                start = f"{prefix}{names[id(target)]}."
                own = {"lora_A": target.lora_A, "lora_B": target.lora_B}
                result.update(
                    make_sharded_tensors_for_checkpoint(
                        own, start, {split: branch.mapping.rule.axis}, sharded_offsets, **place
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


def _initial_a(key: str, rank: int, num_inputs: int, seed: int) -> torch.Tensor:
    """Return a whole A, `[rank, inputs]`: Kaiming-uniform as PEFT's, from a stream named by the
    key.
    """
    digest = hashlib.blake2b(f"{seed}/lora/{key}".encode(), digest_size=7).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(rank, num_inputs).uniform_(
        -1 / math.sqrt(num_inputs), 1 / math.sqrt(num_inputs), generator=stream
    )


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

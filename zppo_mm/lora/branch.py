"""The low-rank branch beside one Megatron linear, with an A and a B per Hugging Face module."""

from __future__ import annotations

import hashlib
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn

from zppo_mm.config.schema import LoraConfig
from zppo_mm.models.adapted import DecodeAdapters
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.mapping import Mapping


class LoraTarget(nn.Module):
    """A and B of one Hugging Face linear, this rank's shard of each.

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
        # Every rank draws the whole A and keeps its columns: the same adapters for every layout.
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
            row-parallel one's output, are split over the tensor ranks.
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
        # A hook, so that Megatron's linear, its fused norm and its communication stay as they are.
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
        """Mark for Megatron which halves are split over the tensor ranks, and how the gradients of
        the others are reduced.

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
        """Forward hook of the linear."""
        result, bias = output
        return result + self._run(inputs[0]), bias

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        if hasattr(self.linear, "layer_norm_weight"):
            hidden = self._normalise(hidden)
        if self._config.dropout and self.linear.training:
            hidden = self._drop(hidden)
        # All adapters of the fused linear at once, `[tokens, 1, sum of ranks]`.
        narrow = F.linear(hidden, self._stacked_a())
        # The tensor ranks communicate between A and B, where `[tokens, 1, sum of ranks]` is small.
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
        """Apply dropout: the same mask on all tensor ranks if they hold the same input, another on
        each if they hold parts of it.
        """
        if parallel.tensor_size() > 1 and (self._sequence_parallel or not self._cuts_rows):
            # Megatron's tracked stream differs between tensor ranks; the default one does not.
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
        # Block diagonal: target k reads the k-th `rank` columns alone.
        blocks = [
            F.pad(target.lora_B, (number * rank, (last - number) * rank))
            for number, target in enumerate(self.targets)
        ]
        if self._order is None:
            return torch.cat(blocks)
        # The extra row of zeros serves rows of the linear without an adapter.
        blocks.append(blocks[0].new_zeros((1, (last + 1) * rank)))
        return torch.cat(blocks).index_select(0, self._order)


def _initial_a(key: str, rank: int, num_inputs: int, seed: int) -> torch.Tensor:
    """Return a whole A, `[rank, inputs]`: Kaiming-uniform as PEFT's, from a stream named by the
    key.
    """
    # Named by the key, not drawn in turn: independent of layers, targets and pipeline stages.
    digest = hashlib.blake2b(f"{seed}/lora/{key}".encode(), digest_size=7).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(rank, num_inputs).uniform_(
        -1 / math.sqrt(num_inputs), 1 / math.sqrt(num_inputs), generator=stream
    )

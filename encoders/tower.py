"""Patches to features: the Hugging Face vision tower, the same on every tensor-parallel rank, its work shared on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

from encoders.balance import GatherFeatures, SumGradients, assign_media


class VisionTower(nn.Module):
    """The vision tower of a Qwen3.5 model.

    Its parameters are those of the Hugging Face module under `model.`; a checkpoint's `model.visual.NAME` is `model.NAME` here.

    Args:
        vision_config: The `vision_config` object of the folder's config.json.
        dtype: Of the parameters; the rotary frequencies stay in float32.
        attn_implementation: Attention kernel by transformers' name.
    """

    def __init__(self, vision_config: Mapping[str, Any], dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        config = Qwen3_5VisionConfig(**dict(vision_config))
        self.merge_size = int(config.spatial_merge_size)
        self.out_hidden_size = int(config.out_hidden_size)
        self.model = Qwen3_5VisionModel._from_config(config, attn_implementation=attn_implementation)  # type: ignore[no-untyped-call]
        self.to(dtype)

    def forward(self, patches: torch.Tensor, grids: torch.Tensor, balance_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Return the features of all media, in the order of the grids.

        Args:
            patches: `[sum of t * h * w, patch elements]`, media after media.
            grids: `[media, 3]` int64.
            balance_group: Ranks that all call with the same arguments and share the media among themselves by patch count; `None`
                computes everything here. Features and parameter gradients are the same either way, provided that every rank of the
                group gets the same gradient of the features, as tensor-parallel ranks do.

        Returns:
            `[sum of t * h * w / merge_size ** 2, out_hidden_size]`.

        Raises:
            ValueError: The patches do not fit the grids.
        """
        counts = grids.prod(dim=1).tolist()
        if sum(counts) != len(patches):
            raise ValueError(
                f"VisionTower: patches do not fit the grids, got {len(patches)}, expected {sum(counts)} for grids {grids.tolist()}; "
                "process each image and video with the processor of this package"
            )
        if balance_group is not None and balance_group.size() > 1:
            return self._forward_balanced(patches, grids, counts, balance_group)
        features: torch.Tensor = self.model(patches, grid_thw=grids).pooler_output
        return features

    def _forward_balanced(
        self, patches: torch.Tensor, grids: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        """Compute this rank's media and gather the others' features."""
        assignment = assign_media(counts, group.size())
        mine = assignment[group.rank()]
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        parameters = dict(self.model.named_parameters())
        trained = [parameters[name] for name in names]
        shared = dict(zip(names, SumGradients.apply(group, *trained), strict=True)) if trained else {}  # type: ignore[no-untyped-call]
        if mine:
            split = patches.split(list(counts))  # type: ignore[no-untyped-call]
            inputs = (torch.cat([split[index] for index in mine]),)
            local = functional_call(self.model, shared, inputs, {"grid_thw": grids[mine]}).pooler_output
        else:
            local = patches.new_zeros((0, self.out_hidden_size), dtype=next(self.model.parameters()).dtype)
        if shared:
            # Ties every rank's features to the parameters: the sum of gradients is a collective, so a rank without media joins it too.
            local = torch.cat([local, shared[names[0]].reshape(-1)[:1].expand(1, self.out_hidden_size) * 0])[: len(local)]
        num_features = [count // self.merge_size**2 for count in counts]
        return cast(torch.Tensor, GatherFeatures.apply(local, group, assignment, num_features))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VisionTower:
        """Keep the rotary frequencies in float32 when the module is cast; rounding them moves every position."""
        exact = {name: buffer.clone() for name, buffer in self.model.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            owner = self.model.get_submodule(name.rpartition(".")[0])
            current = owner.get_buffer(name.rpartition(".")[2])
            if current.dtype != value.dtype:
                current.data = value.to(current.device)
        return self

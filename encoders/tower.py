"""Patches to features: the Hugging Face vision tower, the same on every tensor-parallel rank, its
work divided among ranks on request.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from encoders.balance import GatherFeatures, SumGradients, assign_media

_MODELS = {
    "qwen3_5": ("qwen3_5", "Qwen3_5VisionConfig", "Qwen3_5VisionModel"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
    ),
}
"""Package of transformers' models, config class and model class by `model_type` of the folder's
config.json.
"""


def complete_config(family: str, vision_config: Mapping[str, Any]) -> Any:
    """Return transformers' config of a tower, with what its family says where the folder is silent.

    Args:
        family: `model_type` of the folder's config.json.
        vision_config: The `vision_config` object of the folder's config.json.
    """
    package, config_name, _ = _MODELS[family]
    configs = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    return getattr(configs, config_name)(**dict(vision_config))


class VisionTower(nn.Module):
    """The vision tower of a family.

    Its parameters are those of the Hugging Face module under `model.`; what a checkpoint calls
    `visual.NAME` is `model.NAME` here.

    Attributes:
        num_levels: Vectors per feature: the one that replaces a placeholder's embedding, then those
            for the first layers (deepstack).

    Args:
        family: `model_type` of the folder's config.json.
        vision_config: The `vision_config` object of the folder's config.json.
        dtype: Of the parameters; the rotary frequencies stay in float32.
        attn_implementation: Attention kernel by transformers' name.
        recompute: Keep only the input of every block for the backward pass, and compute its inside
            again there. Only in training mode.
    """

    def __init__(
        self,
        family: str,
        vision_config: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        package, _, model_name = _MODELS[family]
        models = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        config = complete_config(family, vision_config)
        self.merge_size = int(config.spatial_merge_size)
        self.out_hidden_size = int(config.out_hidden_size)
        self.num_levels = 1 + len(getattr(config, "deepstack_visual_indexes", None) or ())
        self.model = getattr(models, model_name)._from_config(
            config, attn_implementation=attn_implementation
        )
        self.to(dtype)
        if recompute:
            _recompute_blocks(self.model)

    def forward(
        self,
        patches: torch.Tensor,
        grids: torch.Tensor,
        balance_group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Return the features of all media, in the order of the grids.

        Args:
            patches: `[sum of t * h * w, patch elements]`, media after media.
            grids: `[media, 3]` int64.
            balance_group: Ranks that all call with the same arguments and share the media among
                themselves by patch count; `None` computes everything here. Features and parameter
                gradients are the same either way, provided that every rank of the group gets the
                same gradient of the features, as tensor-parallel ranks do.

        Returns:
            `[sum of t * h * w / merge_size ** 2, num_levels, out_hidden_size]`.

        Raises:
            ValueError: The patches do not fit the grids.
        """
        counts = grids.prod(dim=1).tolist()
        if sum(counts) != len(patches):
            raise ValueError(
                f"VisionTower: patches do not fit the grids, got {len(patches)}, expected "
                f"{sum(counts)} for grids {grids.tolist()}; process each image and video with the "
                "processor of this package"
            )
        if balance_group is not None and balance_group.size() > 1:
            return self._forward_balanced(patches, grids, counts, balance_group)
        return self._levels(self.model(patches, grid_thw=grids))

    def _levels(self, output: Any) -> torch.Tensor:
        """Return all vectors of every feature from what the Hugging Face module gives, `[features,
        num_levels, out_hidden_size]`.
        """
        further = getattr(output, "deepstack_features", None) or ()
        return torch.stack([output.pooler_output, *further], 1)

    def _forward_balanced(
        self,
        patches: torch.Tensor,
        grids: torch.Tensor,
        counts: Sequence[int],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """Compute this rank's media and gather the others' features."""
        assignment = assign_media(counts, group.size())
        mine = assignment[group.rank()]
        names = [
            name for name, parameter in self.model.named_parameters() if parameter.requires_grad
        ]
        parameters = dict(self.model.named_parameters())
        trained = [parameters[name] for name in names]
        shared = {}
        if trained:
            summed = SumGradients.apply(group, *trained)  # type: ignore[no-untyped-call]
            shared = dict(zip(names, summed, strict=True))
        if mine:
            split = patches.split(list(counts))  # type: ignore[no-untyped-call]
            inputs = (torch.cat([split[index] for index in mine]),)
            local = self._levels(
                functional_call(self.model, shared, inputs, {"grid_thw": grids[mine]})
            ).flatten(1)
        else:
            local = patches.new_zeros(
                (0, self.num_levels * self.out_hidden_size),
                dtype=next(self.model.parameters()).dtype,
            )
        if shared:
            # Ties every rank's features to the parameters: the sum of gradients is a collective, so
            # a rank without media joins it too.
            local = torch.cat(
                [local, shared[names[0]].reshape(-1)[:1].expand(1, local.shape[1]) * 0]
            )[: len(local)]
        num_features = [count // self.merge_size**2 for count in counts]
        gathered = cast(torch.Tensor, GatherFeatures.apply(local, group, assignment, num_features))  # type: ignore[no-untyped-call]
        return gathered.view(len(gathered), self.num_levels, self.out_hidden_size)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> VisionTower:
        """Keep the rotary frequencies in float32 when the module is cast; rounding them moves every
        position.
        """
        exact = {
            name: buffer.clone()
            for name, buffer in self.model.named_buffers()
            if name.endswith("inv_freq")
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            owner = self.model.get_submodule(name.rpartition(".")[0])
            current = owner.get_buffer(name.rpartition(".")[2])
            if current.dtype != value.dtype:
                current.data = value.to(current.device)
        return self


def _recompute_blocks(model: Any) -> None:
    """Let transformers compute every block of a tower again in the backward pass.

    The other variant of `checkpoint` would take the gradients of the module's own parameters, also
    where `functional_call` put others in their place.
    """
    for block in model.blocks:
        block.gradient_checkpointing = True
        # Nothing in a tower is random.
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )

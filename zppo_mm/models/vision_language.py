"""The network of one pipeline stage: vision tower and embedding first, decoder layers, output layer
last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel import layers as megatron_linears
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn.functional import linear

from encoders.fusion import fuse, placeholder_indices
from encoders.tower import VisionTower
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import Architecture
from zppo_mm.models.fp8_shapes import fp8_multiple
from zppo_mm.models.layers.deepstack import spread_features
from zppo_mm.models.layers.delta_rule import chosen_kernels
from zppo_mm.models.layers.packing import PackedLayout, build_layout
from zppo_mm.models.layers.rotary import RotaryTable
from zppo_mm.models.layers.ulysses import UlyssesExchange
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.megatron_versions import gpt_model

_MERGERS = ("model.merger.", "model.deepstack_merger_list.")


@contextmanager
def _output_layer_without_kernel() -> Iterator[None]:
    """Let megatron-core build its output layer where Transformer Engine accumulates gradients and
    Apex is missing.

    It would ask for Apex's kernel. Only the weight of that layer is used here, never its product.
    """
    available = megatron_linears._grad_accum_fusion_available
    megatron_linears._grad_accum_fusion_available = True
    try:
        yield
    finally:
        megatron_linears._grad_accum_fusion_available = available


class VisionLanguageModel(MegatronModule):  # type: ignore[misc]
    """A network on megatron-core's GPTModel, with the Hugging Face vision tower on its first stage.

    Args:
        architecture: The network.
        config: Its megatron-core configuration.
        submodules: What this stage's layers are built from.
        pre_process: Whether this is the first stage.
        post_process: Whether this is the last stage.
        recompute_vision: Whether the tower's blocks are computed again in the backward pass.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        submodules: TransformerBlockSubmodules,
        pre_process: bool,
        post_process: bool,
        recompute_vision: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.architecture = architecture
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = architecture.tie_word_embeddings
        with _output_layer_without_kernel():
            self.language_model = gpt_model(
                config,
                submodules,
                architecture.vocab_size,
                architecture.max_position_embeddings,
                pre_process=pre_process,
                post_process=post_process,
                share_embeddings_and_output_weights=architecture.tie_word_embeddings,
                position_embedding_type="none",
                # Features are fused into the whole sequence; it is scattered after that.
                scatter_embedding_sequence_parallel=False,
            )
        self.model_type = self.language_model.model_type
        self.rotary = RotaryTable(architecture)
        self.vision: VisionTower | None = None
        if pre_process and architecture.vision is not None:
            self.vision = VisionTower(
                architecture.family,
                architecture.vision,
                dtype=config.params_dtype,
                recompute=recompute_vision,
            )
            if not config.use_cpu_initialization:
                self.vision.cuda()

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        patches: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        parents: Sequence[int] | None = None,
        output_layer: bool = True,
    ) -> torch.Tensor:
        """Run packed sequences through this stage. Context ranks are given the same pack, and each
        returns its own tokens.

        Args:
            token_ids: `[tokens]` int64.
            positions: `[3, tokens]` int64, restarting with every sequence that has no parent.
            cu_seqlens: `[sequences + 1]` int32.
            patches: `[patches, patch elements]` of all media in pack order; only the first stage
                uses them.
            grids: `[media, 3]` int64, `(t, h, w)` in patches.
            rows: `[rows]` int64, the tokens whose output is wanted, in any order and number, all
                among `own_tokens`; `None` for all of these.
            parents: Per sequence the one that it continues, -1 for none; `None` if none does. Only
                where `shares_prompts`.
            output_layer: Whether the last stage goes on to the logits. Those of many tokens are
                large; `output_weight` makes them from the hidden states in chunks.

        Returns:
            On the last stage logits `[tokens or rows, vocabulary / tensor size]` float32, or
            without the output layer normalised hidden states `[tokens or rows, hidden]`, the same
            on all tensor ranks. On other stages hidden states `[tokens, 1, hidden]` (part of the
            tokens under sequence or context parallelism).

        Raises:
            ValueError: The media do not fit the placeholder tokens.
            ModelError: Media came without a vision tower.
        """
        own = self.own_tokens(len(token_ids))
        token_ids, positions, cu_seqlens = self.pad_tokens(token_ids, positions, cu_seqlens)
        layout = build_layout(cu_seqlens, parents=parents, exchange=self._exchange())
        hidden = self.run_stage(token_ids, positions, layout, patches, grids)
        if not self.post_process:
            return hidden
        # From here on tensor ranks work on all tokens and their own slice of the vocabulary; their
        # gradients of the hidden states are summed.
        group = self.language_model.pg_collection.tp
        hidden = (
            gather_from_sequence_parallel_region(hidden, group=group)
            if self.config.sequence_parallel
            else copy_to_tensor_model_parallel_region(hidden, group=group)
        ).squeeze(1)
        hidden = (
            hidden[: own.stop - own.start]
            if rows is None
            else hidden.index_select(0, rows - own.start)
        )
        return linear(hidden, self.output_weight()).float() if output_layer else hidden

    def run_stage(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        layout: PackedLayout,
        patches: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this stage's hidden states, normalised on the last; the first embeds, the others
        read the input tensor that was set.
        """
        exchange = layout.exchange
        hidden, further = (
            self.embed(token_ids, patches, grids, exchange) if self.pre_process else (None, None)
        )
        table = self.rotary.table(
            positions if exchange is None else exchange.own_tokens(positions, 1)
        )
        output = self.language_model.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=further,
            rotary_pos_emb=table,
            packed_seq_params=layout,
        )
        return cast(torch.Tensor, output)

    def embed(
        self,
        token_ids: torch.Tensor,
        patches: torch.Tensor | None,
        grids: torch.Tensor | None,
        exchange: UlyssesExchange | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return embeddings with the media's features at their placeholder tokens, and what the
        first layers add for them.

        Returns:
            `[tokens, 1, hidden]` and `[tokens, layers, hidden]`, or this rank's part of them; the
            second is `None` without deepstack or without media.
        """
        embeddings = self.language_model.embedding(input_ids=token_ids[None], position_ids=None)
        further = None
        if self.vision is not None:
            embeddings, further = self._fuse_media(
                self.vision, embeddings, token_ids, patches, grids
            )
        elif patches is not None:
            raise ModelError(
                f"VisionLanguageModel: media without a vision tower, got {len(patches)} patches, "
                "expected none for a text-only network; use a folder with a vision tower or text "
                "questions"
            )
        if exchange is not None:
            # Each context rank embeds the whole pack; gradients of what it embedded for the others
            # reach it as zeros.
            embeddings = exchange.own_tokens(embeddings)
            further = exchange.own_tokens(further) if further is not None else None
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
            further = scatter_to_sequence_parallel_region(further) if further is not None else None
        return embeddings, further

    def _fuse_media(
        self,
        tower: VisionTower,
        embeddings: torch.Tensor,
        token_ids: torch.Tensor,
        patches: torch.Tensor | None,
        grids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = next(tower.parameters())
        if patches is None or grids is None:
            features = embeddings.new_zeros((0, tower.num_levels, embeddings.shape[-1]))
        else:
            # Tensor ranks hold the same tower and get the same gradient of the features, so they
            # share several media among themselves.
            group = self.language_model.pg_collection.tp if len(grids) > 1 else None
            features = tower(
                patches.to(weight.device, weight.dtype), grids.to(weight.device), group
            )
        placeholders = (self.architecture.image_token_id, self.architecture.video_token_id)
        fused = fuse(embeddings, token_ids, features[:, 0], *placeholders)
        if (
            patches is None
            and torch.is_grad_enabled()
            and any(parameter.requires_grad for parameter in tower.parameters())
        ):
            # Every parameter must get a gradient in every micro-batch: bucketed gradient reduction
            # waits for all of them.
            fused = fused + self._idle_features(tower, weight).sum().to(fused.dtype) * 0
        if tower.num_levels == 1 or not len(features):
            return fused, None
        return fused, spread_features(
            features[:, 1:].to(fused.dtype),
            placeholder_indices(token_ids, *placeholders),
            len(token_ids),
        )

    def _idle_features(self, tower: VisionTower, weight: torch.Tensor) -> torch.Tensor:
        """Return the features of one blank block of patches."""
        size = self.architecture.spatial_merge_size
        # config.json may leave out its family's defaults; the tower was built with
        # everything.
        vision = cast(Any, tower.model.config)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        blank = weight.new_zeros((size * size, width))
        return cast(
            torch.Tensor, tower(blank, torch.tensor([[1, size, size]], device=weight.device))
        )

    def output_weight(self) -> torch.Tensor:
        """Return the weight of the output layer, `[vocabulary / tensor size, hidden]`; last stage
        only.
        """
        if self.share_embeddings_and_output_weights:
            return cast(torch.Tensor, self.shared_embedding_or_output_weight())
        return cast(torch.Tensor, self.language_model.output_layer.weight)

    def pad_tokens(
        self, token_ids: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add one more sequence where the number of tokens must be a multiple of something."""
        missing = -len(token_ids) % self._token_multiple()
        if not missing:
            return token_ids, positions, cu_seqlens
        return (
            torch.cat([token_ids, token_ids.new_zeros(missing)]),
            torch.cat(
                [positions, torch.arange(missing, device=positions.device).expand(3, -1)], dim=1
            ),
            torch.cat([cu_seqlens, cu_seqlens[-1:] + missing]),
        )

    def own_tokens(self, num_tokens: int) -> slice:
        """Return which tokens of a pack this context rank has: all of them without context
        parallelism, perhaps none of a short pack.
        """
        size = self.config.context_parallel_size
        part = (num_tokens + -num_tokens % self._token_multiple()) // size
        start = part * (parallel.context_rank() if size > 1 else 0)
        return slice(start, max(start, min(start + part, num_tokens)))

    def _token_multiple(self) -> int:
        """Return what the number of tokens of a pack must be a multiple of."""
        multiple: int = self.config.context_parallel_size
        if self.config.sequence_parallel:
            multiple *= self.config.tensor_model_parallel_size
        # The tokens of a rank are one of the sizes of every matrix product.
        return multiple * fp8_multiple(self.config.fp8_recipe) if self.config.fp8 else multiple

    def _exchange(self) -> UlyssesExchange | None:
        size = self.config.context_parallel_size
        return (
            UlyssesExchange(parallel.context_group(), parallel.context_rank(), size)
            if size > 1
            else None
        )

    @property
    def shares_prompts(self) -> bool:
        """Whether a sequence may continue another one; the same on every rank, whatever layers its
        stage has.
        """
        return not self.architecture.has_linear_attention or chosen_kernels(self.config) is None

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the hidden states of the previous stage; Megatron's schedules call this before
        `forward`.
        """
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return the weight that first and last stage share in a tied network; Megatron's gradient
        finalisation asks for it.
        """
        return cast("torch.Tensor | None", self.language_model.shared_embedding_or_output_weight())

    def parameters_of(self, part: str) -> Iterator[nn.Parameter]:
        """Yield this stage's parameters of `vision` (the tower without its mergers), `projector`
        (the mergers) or `language`.
        """
        if part == "language":
            yield from self.language_model.parameters()
            return
        for name, parameter in self.vision.named_parameters() if self.vision is not None else ():
            if (part == "projector") == name.startswith(_MERGERS):
                yield parameter

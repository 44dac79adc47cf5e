"""Decoder layers that take in features of the media beside those in the embeddings (deepstack)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer


class DeepstackLayer(TransformerLayer):  # type: ignore[misc]
    """megatron-core's layer, with the features meant for it added to its output.

    The features travel as `context`, which decoder-only layers do not use: it is the one argument
    that megatron-core hands to every layer as a tensor, so activation recomputation keeps its
    gradient.
    """

    def forward(
        self, *args: Any, context: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer.

        Args:
            *args: As megatron-core's layer.
            context: `[tokens, layers, hidden]` what is added after each of the first layers, zero
                where there is no medium; `None` for nothing at all.
            **kwargs: As megatron-core's layer.

        Returns:
            Hidden states `[tokens, 1, hidden]`, and the context for the next layer.
        """
        hidden, _context = super().forward(*args, context=None, **kwargs)
        level = self.layer_number - 1
        if context is not None and level < context.shape[1]:
            hidden = hidden + context[:, level, None]
        return hidden, context


def spread_features(features: torch.Tensor, indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return `[tokens, layers, hidden]` with `[features, layers, hidden]` at their tokens' indices
    and zeros elsewhere.
    """
    empty = features.new_zeros((num_tokens, *features.shape[1:]))
    return empty.index_copy(0, indices, features)

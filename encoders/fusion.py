"""Features into the placeholder tokens of a prompt."""

from __future__ import annotations

import torch


def placeholder_indices(
    token_ids: torch.Tensor, image_token_id: int, video_token_id: int
) -> torch.Tensor:
    """Return the indices of placeholder tokens in `[tokens]`, ascending: `[features]` int64."""
    return torch.nonzero((token_ids == image_token_id) | (token_ids == video_token_id)).squeeze(1)


def fuse(
    embeddings: torch.Tensor,
    token_ids: torch.Tensor,
    features: torch.Tensor,
    image_token_id: int,
    video_token_id: int,
) -> torch.Tensor:
    """Replace the embeddings of placeholder tokens by media features, both in prompt order.

    Args:
        embeddings: `[tokens, hidden]` or `[tokens, 1, hidden]`.
        token_ids: `[tokens]`.
        features: `[features, hidden]`, one per placeholder token.
        image_token_id: Placeholder of images.
        video_token_id: Placeholder of videos.

    Returns:
        A new tensor like `embeddings`; gradients reach both inputs.

    Raises:
        ValueError: The number of features is not the number of placeholder tokens, or the hidden
            sizes differ.
    """
    assert token_ids.shape == embeddings.shape[:1], "one token id per embedding"
    indices = placeholder_indices(token_ids, image_token_id, video_token_id)
    if len(indices) != len(features):
        raise ValueError(
            f"fuse: features do not fit the placeholders, got {len(features)} features, expected "
            f"{len(indices)} for as many placeholder tokens; expand the prompt from the grids of "
            "these media"
        )
    if features.shape[-1] != embeddings.shape[-1]:
        raise ValueError(
            f"fuse: features do not fit the embeddings, got hidden size {features.shape[-1]}, "
            f"expected {embeddings.shape[-1]}; the tower's out_hidden_size must be the language "
            "model's hidden size"
        )
    flat = embeddings.reshape(len(token_ids), -1)
    return flat.index_copy(0, indices, features.to(flat.dtype)).reshape(embeddings.shape)

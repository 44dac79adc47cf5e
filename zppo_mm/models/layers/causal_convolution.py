"""The short causal convolution in front of the delta rule, for padded batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_convolution(
    inputs: torch.Tensor, weight: torch.Tensor, context: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve every channel over time and apply SiLU.

    Args:
        inputs: `[batch, length, channels]`.
        weight: `[channels, 1, taps]`.
        context: `[batch, taps - 1, channels]` inputs before the first; zeros if not given.

    Returns:
        Like `inputs`.
    """
    if context is None:
        padded = F.pad(inputs.transpose(1, 2), (weight.shape[-1] - 1, 0))
    else:
        padded = torch.cat([context, inputs], 1).transpose(1, 2)
    return F.silu(F.conv1d(padded, weight, groups=weight.shape[0])).transpose(1, 2)


def last_inputs(inputs: torch.Tensor, lengths: tuple[int, ...], count: int) -> torch.Tensor:
    """Return the last `count` inputs of every right-padded sequence, zeros before a shorter one's
    start: `[batch, count, channels]`.
    """
    padded = F.pad(inputs, (0, 0, count, 0))
    indices = torch.tensor(lengths, device=inputs.device)[:, None] + torch.arange(
        count, device=inputs.device
    )
    return padded.gather(1, indices[..., None].expand(-1, -1, inputs.shape[-1]))

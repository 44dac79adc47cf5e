"""Rotary position embedding over three axes (time, height, width) whose frequencies interleave."""

from __future__ import annotations

import torch

from zppo_mm.models.architecture import Architecture


class InterleavedRotary:
    """Makes the rotary table of tokens from their three positions.

    megatron-core's own multimodal rotary module lays the axes in sections and cannot interleave them. Not a module: the frequencies
    must stay in float32 and belong in no checkpoint.

    Args:
        architecture: Number of rotated channels, base and frequencies per axis.
    """

    def __init__(self, architecture: Architecture) -> None:
        dim = architecture.rotary_dim
        self._frequencies = 1.0 / (architecture.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        axis = torch.zeros(dim // 2, dtype=torch.long)
        for which in (1, 2):
            axis[which : architecture.mrope_section[which] * 3 : 3] = which
        self._axis = axis

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosine and sine of every rotated channel.

        Args:
            positions: `[3, tokens]`.

        Returns:
            `[2, tokens, 1, rotated channels]` float32, cosines first; the axis of length 1 stands for the heads.
        """
        if self._frequencies.device != positions.device:
            self._frequencies, self._axis = self._frequencies.to(positions.device), self._axis.to(positions.device)
        angles = positions.float().index_select(0, self._axis).t() * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return torch.stack([angles.cos(), angles.sin()])


def rotate(heads: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the first channels of every head.

    Args:
        heads: `[tokens, heads, head_dim]`.
        table: `[2, tokens, 1, rotated channels]`.
    """
    dim = table.shape[-1]
    cosine, sine = table.to(heads.dtype).unbind(0)
    rotated = heads[..., :dim]
    low, high = rotated.chunk(2, dim=-1)
    turned = rotated * cosine + torch.cat([-high, low], dim=-1) * sine
    return turned if dim == heads.shape[-1] else torch.cat([turned, heads[..., dim:]], dim=-1)

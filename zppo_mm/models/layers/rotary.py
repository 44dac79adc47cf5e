"""Rotary position embedding over three axes (time, height, width)."""

from __future__ import annotations

import torch

from zppo_mm.models.families.architecture import Architecture


class RotaryTable:
    """Makes the rotary table of tokens from their three positions; in a text-only network only the
    first counts.

    megatron-core's own multimodal rotary module cannot interleave the axes and needs CUDA. Not a
    module: the frequencies must stay in float32 and belong in no checkpoint.

    Args:
        architecture: Frequencies, and which of them belong to which axis.
    """

    def __init__(self, architecture: Architecture) -> None:
        dim = architecture.rotary_dim
        self._frequencies = torch.tensor(architecture.rotary_frequencies, dtype=torch.float32)
        self._amplitude = architecture.rotary_amplitude
        time, height, width = architecture.mrope_section
        if architecture.mrope_interleaved:
            self._axis = torch.zeros(dim // 2, dtype=torch.long)
            self._axis[1 : height * 3 : 3] = 1
            self._axis[2 : width * 3 : 3] = 2
        else:
            self._axis = torch.tensor([0] * time + [1] * height + [2] * width)

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosine and sine of every rotated channel.

        Args:
            positions: `[3, tokens]`.

        Returns:
            `[2, tokens, 1, rotated channels]` float32, cosines first; the axis of length 1 stands
            for the heads.
        """
        if self._frequencies.device != positions.device:
            self._frequencies, self._axis = (
                self._frequencies.to(positions.device),
                self._axis.to(positions.device),
            )
        angles = positions.float().index_select(0, self._axis).t() * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return torch.stack([angles.cos(), angles.sin()]) * self._amplitude


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

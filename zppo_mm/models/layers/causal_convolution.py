"""The short causal convolution in front of the delta rule, for padded batches."""

from __future__ import annotations

from typing import Any, cast

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
        padded = F.pad(inputs, (0, 0, weight.shape[-1] - 1, 0))
    else:
        padded = torch.cat([context, inputs], 1)
    sums = cast(torch.Tensor, _TapSums.apply(padded, weight))  # type: ignore[no-untyped-call]
    return F.silu(sums).to(inputs.dtype)


class _TapSums(torch.autograd.Function):
    """A few sums of shifted inputs, because channels stay the last axis so: `conv1d` wants them
    before the time, and on a CPU it takes more than twice as long with its copies.
    """

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return `[batch, length, channels]` float32 sums over the taps."""
        ctx.save_for_backward(padded, weight)
        taps, length = _taps(weight), padded.shape[1] - weight.shape[-1] + 1
        sums = padded[:, :length] * taps[0]
        for shift in range(1, len(taps)):
            sums.addcmul_(padded[:, shift : shift + length], taps[shift])
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of inputs and weight."""
        (upstream,) = gradients
        padded, weight = ctx.saved_tensors
        taps, length = _taps(weight), upstream.shape[1]
        of_inputs = padded.new_zeros(padded.shape, dtype=torch.float32)
        of_taps = torch.empty_like(taps)
        for shift in range(len(taps)):
            rows = slice(shift, shift + length)
            of_inputs[:, rows].addcmul_(upstream, taps[shift])
            of_taps[shift] = (upstream * padded[:, rows]).sum((0, 1))
        return of_inputs.to(padded.dtype), of_taps.t()[:, None].to(weight.dtype)


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """Return `[taps, channels]` float32 of `[channels, 1, taps]`."""
    return weight[:, 0].t().float().contiguous()


def last_inputs(inputs: torch.Tensor, lengths: tuple[int, ...], count: int) -> torch.Tensor:
    """Return the last `count` inputs of every right-padded sequence, zeros before a shorter one's
    start: `[batch, count, channels]`.
    """
    padded = F.pad(inputs, (0, 0, count, 0))
    indices = torch.tensor(lengths, device=inputs.device)[:, None] + torch.arange(
        count, device=inputs.device
    )
    return padded.gather(1, indices[..., None].expand(-1, -1, inputs.shape[-1]))

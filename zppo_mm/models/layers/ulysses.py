"""Context parallelism as in DeepSpeed-Ulysses: an all-to-all before and after every layer that
mixes tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all


@dataclass(frozen=True, slots=True)
class UlyssesExchange:
    """The all-to-alls of the ranks that share a pack.

    Everything that treats tokens one by one runs on equal contiguous parts of the pack. Attention,
    the convolution and the delta rule mix tokens but not heads: they run on the whole pack and a
    part of the heads, so they need no variant of their own. Heads are split as tensor ranks split
    them, in contiguous blocks, so queries stay with their KV heads.

    Attributes:
        group: The ranks, in the order of their parts.
        rank: Of this process; also the number of its part.
        size: Number of parts.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def own_tokens(self, whole: torch.Tensor, axis: int = 0) -> torch.Tensor:
        """Return this rank's part of a tensor whose axis counts the tokens of the pack."""
        return whole.chunk(self.size, axis)[self.rank]

    def own_heads(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's heads of a parameter whose first axis counts heads, or channels head
        by head.

        The gradients of the other heads are zero here; the reduction over data and context ranks
        adds them up.
        """
        return whole.chunk(self.size)[self.rank]

    def to_heads(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Ulysses all-to-all from parts of the tokens to parts of the heads, one for all tensors.

        Args:
            parts: `[tokens / size, heads, ...]` each, of any number of heads that the size divides.

        Returns:
            `[tokens, heads / size, ...]` each.
        """
        sent = [part.reshape(len(part), self.size, -1).transpose(0, 1) for part in parts]
        received = cast(torch.Tensor, all_to_all(self.group, torch.cat(sent, -1))).flatten(0, 1)
        pieces = torch.split(received, [piece.shape[-1] for piece in sent], -1)
        return [
            piece.reshape(len(piece), -1, *part.shape[2:])
            for piece, part in zip(pieces, parts, strict=True)
        ]

    def to_tokens(self, mixed: torch.Tensor) -> torch.Tensor:
        """The all-to-all back: `[tokens, heads / size, ...]` to `[tokens / size, heads, ...]`."""
        sent = mixed.reshape(self.size, -1, *mixed.shape[1:])
        received = cast(torch.Tensor, all_to_all(self.group, sent))
        return received.transpose(0, 1).flatten(1, 2)

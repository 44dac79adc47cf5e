"""Context parallelism: ranks that share the tokens of a pack swap them for shares of the heads
where tokens mix, and swap back.
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
    """This rank's place among those that share a pack.

    Everything that treats tokens one by one runs on equal contiguous parts of the pack. Attention,
    the convolution and the delta rule mix tokens but not heads: they run on the whole pack and a
    share of the heads, so they need no variant of their own. Heads are shared as tensor ranks share
    them, in contiguous blocks, so queries stay with their keys.

    Attributes:
        group: The ranks, in the order of their parts.
        rank: This one's part.
        size: Number of parts.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def own_tokens(self, whole: torch.Tensor, axis: int = 0) -> torch.Tensor:
        """Return this rank's part of a tensor whose axis counts the tokens of the pack."""
        return whole.chunk(self.size, axis)[self.rank]

    def own_heads(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of a parameter whose first axis counts heads, or channels head
        by head.

        The gradients of the other shares are zero here; the reduction over data and context ranks
        puts the shares together.
        """
        return whole.chunk(self.size)[self.rank]

    def to_heads(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Swap tokens for heads, in one message per rank.

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
        """Swap heads for tokens: `[tokens, heads / size, ...]` to `[tokens / size, heads, ...]`."""
        sent = mixed.reshape(self.size, -1, *mixed.shape[1:])
        received = cast(torch.Tensor, all_to_all(self.group, sent))
        return received.transpose(0, 1).flatten(1, 2)

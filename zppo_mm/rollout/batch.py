"""What the decoding loop knows of its sequences besides the network's caches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from zppo_mm.experience import NO_TOKEN, FloatArray, IntArray
from zppo_mm.rollout.engine import Generation, SamplingParams

UNIFORM_BLOCK = 256
"""Uniform numbers drawn at once per sequence; a generator gives the same numbers in one draw or in
several.
"""


class UniformStreams:
    """One uniform number per sequence and step, each sequence from its own generator.

    Args:
        generators: One per sequence, in the order of the wave.
    """

    def __init__(self, generators: Sequence[np.random.Generator]) -> None:
        self._generators = generators
        self._block = torch.empty(0)
        self._start = -UNIFORM_BLOCK

    def column(self, step: int, rows: torch.Tensor | None) -> torch.Tensor:
        """Return the float64 numbers of a step, `[batch]`, for the sequences that are left; steps
        come in order.
        """
        if step >= self._start + UNIFORM_BLOCK:
            self._start += UNIFORM_BLOCK
            self._block = torch.from_numpy(
                np.stack([stream.random(UNIFORM_BLOCK) for stream in self._generators], axis=1)
            )
        column = self._block[step - self._start]
        return column if rows is None else column.index_select(0, rows)


class RolloutBatch:
    """Responses so far, and which sequences are still being decoded.

    Args:
        start_positions: Position of each sequence's first response token.
        sampling: Length limit, stop tokens and presence penalty.
        vocab_size: Size of the vocabulary.
        device: The network's.

    Attributes:
        rows: Indices in the wave of the sequences left in the batch, on the CPU; `None` while none
            was dropped.
        seen: `[batch, vocabulary]` tokens already in the response; `None` without a presence
            penalty.
    """

    def __init__(
        self,
        start_positions: Sequence[int],
        sampling: SamplingParams,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        total = len(start_positions)
        self.device = device
        self.rows: torch.Tensor | None = None
        self.seen = (
            torch.zeros((total, vocab_size), dtype=torch.bool, device=device)
            if sampling.presence_penalty
            else None
        )
        self._positions = torch.tensor(start_positions, device=device)
        # Where nothing could be drawn, a sequence ends as well.
        self._ends = torch.tensor(
            [*sampling.stop_token_ids, NO_TOKEN], dtype=torch.int64, device=device
        )
        self._ended = torch.zeros(total, dtype=torch.bool, device=device)
        self._steps: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]] = []
        self._lengths = np.zeros(total, dtype=np.int64)
        self._has_ended = np.zeros(total, dtype=bool)
        self.num_active = total

    @property
    def size(self) -> int:
        """Sequences in the batch, ended ones included until they are dropped."""
        return len(self._positions)

    def append(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Add one token to every sequence; to those that ended before, one that is not kept.

        Args:
            tokens: `[batch]` int64, `NO_TOKEN` where nothing could be drawn.
            logprobs: `[batch]` float32.
        """
        self._steps.append((self.rows, tokens, logprobs))
        if self.seen is not None:
            self.seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
        ends = torch.isin(tokens, self._ends) & ~self._ended
        # One transfer per step shows the host which sequences ended.
        ended_now = torch.nonzero(ends).squeeze(1).cpu()
        if len(ended_now):
            self._ended |= ends
            indices = ended_now if self.rows is None else self.rows[ended_now]
            self._lengths[indices.numpy()] = len(self._steps)
            self._has_ended[indices.numpy()] = True
            self.num_active -= len(ended_now)

    def drop_finished(self) -> torch.Tensor:
        """Keep only sequences that have not ended; returns their indices in the batch so far,
        `[kept]`.
        """
        kept = torch.nonzero(~self._ended).squeeze(1)
        on_host = kept.cpu()
        self.rows = on_host if self.rows is None else self.rows[on_host]
        self._positions = self._positions[kept]
        self._ended = self._ended[kept]
        self.seen = self.seen[kept] if self.seen is not None else None
        return kept

    def positions(self) -> torch.Tensor:
        """Return the `[3, batch]` positions of the tokens appended last: text after the prompt, the
        same on all axes.
        """
        return (self._positions + (len(self._steps) - 1)).expand(3, -1)

    def generations(self) -> list[Generation]:
        """Return every sequence's response, in the order of the wave."""
        num_steps, total = len(self._steps), len(self._lengths)
        tokens: IntArray = np.zeros((num_steps, total), dtype=np.int64)
        logprobs: FloatArray = np.zeros((num_steps, total), dtype=np.float32)
        for step, (rows, step_tokens, step_logprobs) in enumerate(self._steps):
            indices = slice(None) if rows is None else rows.numpy()
            tokens[step, indices] = step_tokens.cpu().numpy()
            logprobs[step, indices] = step_logprobs.cpu().numpy()
        lengths = np.where(self._has_ended, self._lengths, num_steps)
        broken = ((tokens == NO_TOKEN) & (np.arange(num_steps)[:, None] == lengths - 1)).any(0)
        return [
            Generation(
                tokens[:length, index].copy(),
                logprobs[:length, index].copy(),
                "stop" if self._has_ended[index] else "length",
                is_broken=bool(broken[index]),
            )
            for index, length in enumerate((lengths - broken).tolist())
        ]

"""What the decoding loop knows of its rows besides the network's caches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from zppo_mm.experience import NO_TOKEN, FloatArray, IntArray
from zppo_mm.models.layers.blocks import Moves
from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.rollout.engine import Generation, SamplingParams

UNIFORM_BLOCK = 256
"""Uniform numbers drawn at once per row; a generator gives the same numbers in one draw or in
several.
"""


class UniformStreams:
    """One uniform number per row and token, each row from its own generator.

    Args:
        max_rows: Most rows.
    """

    def __init__(self, max_rows: int) -> None:
        self._generators: list[np.random.Generator] = []
        self._block = np.zeros((max_rows, UNIFORM_BLOCK))

    def add(self, stream: np.random.Generator, num_drawn: int) -> None:
        """Add a row whose stream has given so many numbers already."""
        self._generators.append(stream)
        # `numbers` draws the block itself where one begins.
        for _ in range(-(-num_drawn // UNIFORM_BLOCK)):
            self._block[len(self._generators) - 1] = stream.random(UNIFORM_BLOCK)

    def numbers(self, first: int, lengths: IntArray) -> torch.Tensor:
        """Return the float64 numbers of the next tokens, `[rows]`.

        Args:
            first: The first of these rows; all that follow it are meant.
            lengths: `[rows]` tokens drawn so far.
        """
        indices = lengths % UNIFORM_BLOCK
        for row in np.flatnonzero(indices == 0) + first:
            self._block[row] = self._generators[row].random(UNIFORM_BLOCK)
        rows = np.arange(first, first + len(lengths))
        return torch.from_numpy(self._block[rows, indices])

    def move(self, moves: Moves, num_left: int) -> None:
        """Renumber the rows."""
        self._block[moves.targets] = self._block[moves.sources]
        for target, source in zip(moves.targets, moves.sources, strict=True):
            self._generators[target] = self._generators[source]
        del self._generators[num_left:]


class RolloutBatch:
    """Responses so far of the rows that are being decoded.

    Args:
        max_rows: Most rows.
        sampling: Length limit, stop tokens and presence penalty.
        vocab_size: Size of the vocabulary.
        device: The network's.

    Attributes:
        names: Of every row, request and rollout.
        streams: Random numbers of the rows.
    """

    def __init__(
        self, max_rows: int, sampling: SamplingParams, vocab_size: int, device: torch.device
    ) -> None:
        self.device = device
        self.names: list[tuple[int, int]] = []
        self.streams = UniformStreams(max_rows)
        self._max_new_tokens = sampling.max_new_tokens
        # Where nothing could be drawn, a response ends as well.
        self._ends = torch.tensor(
            [*sampling.stop_token_ids, NO_TOKEN], dtype=torch.int64, device=device
        )
        shape = (max_rows, sampling.max_new_tokens)
        self._tokens = torch.empty(shape, dtype=torch.int64, device=device)
        self._logprobs = torch.empty(shape, dtype=torch.float32, device=device)
        self._starts = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._columns = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._rows = torch.arange(max_rows, device=device)
        self._lengths = np.zeros(max_rows, np.int64)
        self._ages = np.zeros(max_rows, np.int64)
        self._num_added = 0
        self._seen = (
            torch.zeros((max_rows, vocab_size), dtype=torch.bool, device=device)
            if sampling.presence_penalty
            else None
        )

    def __len__(self) -> int:
        return len(self.names)

    def add(
        self,
        name: tuple[int, int],
        start_position: int,
        stream: np.random.Generator,
        response_ids: IntArray,
        rollout_logprobs: FloatArray,
    ) -> None:
        """Add a row.

        Args:
            name: Request and rollout.
            start_position: Position of the first response token.
            stream: Of this rollout, from its beginning.
            response_ids: What it has sampled before.
            rollout_logprobs: Like `response_ids`.
        """
        row, length = len(self.names), len(response_ids)
        self.names.append(name)
        self.streams.add(stream, length)
        self._starts[row], self._columns[row], self._lengths[row] = start_position, length, length
        self._ages[row] = self._num_added
        self._num_added += 1
        tokens = torch.from_numpy(response_ids).to(self.device)
        self._tokens[row, :length] = tokens
        self._logprobs[row, :length] = torch.from_numpy(rollout_logprobs).to(self.device)
        if self._seen is not None:
            self._seen[row] = False
            self._seen[row, tokens] = True

    def uniforms(self, first: int) -> torch.Tensor:
        """Return the random numbers of the next tokens of the rows from `first` on, `[rows]`."""
        return self.streams.numbers(first, self._lengths[first : len(self)])

    def seen(self, first: int) -> torch.Tensor | None:
        """Return `[rows, vocabulary]` tokens already in the responses of the rows from `first` on;
        `None` without a presence penalty.
        """
        return None if self._seen is None else self._seen[first : len(self)]

    def append(self, tokens: torch.Tensor, logprobs: torch.Tensor, first: int) -> IntArray:
        """Add one token to the rows from `first` on; returns those whose response has ended.

        Args:
            tokens: `[rows]` int64, `NO_TOKEN` where nothing could be drawn.
            logprobs: `[rows]` float32.
            first: The first of these rows.
        """
        rows = slice(first, len(self))
        at = self._rows[rows], self._columns[rows]
        self._tokens[at], self._logprobs[at] = tokens, logprobs
        self._columns[rows] += 1
        self._lengths[rows] += 1
        if self._seen is not None:
            self._seen[rows].scatter_(1, tokens.clamp(min=0)[:, None], True)
        # One transfer per step shows the host which rows ended.
        stopped = torch.nonzero(torch.isin(tokens, self._ends)).squeeze(1).cpu().numpy()
        full = np.flatnonzero(self._lengths[rows] == self._max_new_tokens)
        return np.union1d(stopped, full) + first

    def last_tokens(self) -> torch.Tensor:
        """Return the token that each row got last, `[rows]`."""
        return self._tokens[self._rows[: len(self)], self._columns[: len(self)] - 1]

    def positions(self) -> torch.Tensor:
        """Return the `[3, rows]` positions of the tokens appended last: text after the prompt, the
        same on all axes.
        """
        rows = slice(len(self))
        return (self._starts[rows] + self._columns[rows] - 1).expand(3, -1)

    def youngest(self) -> int:
        """Return the row that was added last."""
        return int(self._ages[: len(self)].argmax())

    def response(self, row: int) -> tuple[IntArray, FloatArray]:
        """Return a row's tokens and log-probs so far, `[response]` each."""
        length = self._lengths[row]
        return (
            self._tokens[row, :length].cpu().numpy().copy(),
            self._logprobs[row, :length].cpu().numpy().copy(),
        )

    def generation(self, row: int, stop_token_ids: Sequence[int]) -> Generation:
        """Return the response of a row that has ended."""
        tokens, logprobs = self.response(row)
        if tokens[-1] == NO_TOKEN:
            return Generation(tokens[:-1].copy(), logprobs[:-1].copy(), "stop", is_broken=True)
        return Generation(tokens, logprobs, "stop" if tokens[-1] in stop_token_ids else "length")

    def release(self, rows: IntArray, cache: DecodeCache) -> None:
        """Drop these rows, all different, from the batch and its cache; in both, the last rows take
        their numbers.
        """
        if not len(rows):
            return
        moves = cache.release(rows)
        num_left = len(self) - len(rows)
        self.streams.move(moves, num_left)
        for target, source in zip(moves.targets, moves.sources, strict=True):
            self.names[target] = self.names[source]
        del self.names[num_left:]
        for numbers in (self._lengths, self._ages):
            numbers[moves.targets] = numbers[moves.sources]
        if not moves:
            return
        to, of = (
            torch.from_numpy(index).to(self.device) for index in (moves.targets, moves.sources)
        )
        for held in (self._tokens, self._logprobs, self._starts, self._columns, self._seen):
            if held is not None:
                held[to] = held[of]

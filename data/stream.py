"""Endless questions: weighted over the sources, shuffled in every epoch, the same on every rank,
resumable at once.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError, SampleError
from data.health import SampleHealth
from data.question import Question
from data.source import Source

STATE_VERSION = 2


class QuestionStream:
    """Endless sequence of questions that depends on the seed and the sources alone.

    Every source is shuffled again in each of its epochs. The next question comes from the source
    that is furthest behind its weight, so that after any number of questions each source is within
    one question per source of its fraction.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        seed: int,
        health: SampleHealth | None = None,
    ) -> None:
        """Start at the first question.

        Args:
            sources: With their relative weights.
            seed: Seed of the order.
            health: Counts good and bad samples; by default one with its default limits.

        Raises:
            DataError: There is no source, or a weight is not positive.
        """
        if not sources:
            raise DataError(
                "QuestionStream: no sources, expected at least one; name it under data.train"
            )
        for folder, weight in sources:
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(
                    f"QuestionStream: {folder.path}: weight is not positive, got {weight}; correct "
                    "it or leave the source out"
                )
            if len(folder) == 0:
                raise DataError(
                    f"QuestionStream: {folder.path}: it holds no samples; write it again"
                )
        total = sum(weight for _, weight in sources)
        self._folders = [folder for folder, _ in sources]
        self._fractions = [weight / total for _, weight in sources]
        self._seed = seed
        self._sources = [
            {
                "path": str(folder.path),
                "fraction": weight / total,
                "num_samples": len(folder),
                "fingerprint": folder.fingerprint(),
            }
            for folder, weight in sources
        ]
        self.health = health if health is not None else SampleHealth()
        self._delivered = [0] * len(sources)
        self._positions = [0] * len(sources)
        self._orders: list[tuple[int, npt.NDArray[np.int64]] | None] = [None] * len(sources)

    @property
    def num_samples(self) -> int:
        """Samples of all sources together, bad ones included."""
        return sum(len(folder) for folder in self._folders)

    def take(self, n: int) -> list[Question]:
        """Return the next `n` good questions; bad samples are skipped and counted.

        Raises:
            DataError: Too many bad samples, or a whole epoch of a source without a good one.
        """
        return [self._next(self.health) for _ in range(n)]

    def look_ahead(self) -> Callable[[int], list[Question]]:
        """Return what gives the next questions from here on without moving the stream, counting or
        naming a bad sample; may be called in another thread, once.
        """
        ahead = copy.copy(self)
        ahead._delivered, ahead._positions = list(self._delivered), list(self._positions)
        ahead._orders = list(self._orders)
        return lambda n: [ahead._next(None) for _ in range(n)]

    def _next(self, health: SampleHealth | None) -> Question:
        num_taken = sum(self._delivered) + 1
        lag = [
            fraction * num_taken - count
            for fraction, count in zip(self._fractions, self._delivered, strict=True)
        ]
        source = lag.index(max(lag))
        folder = self._folders[source]
        for _ in range(len(folder)):
            shard, key = folder.keys()[self._draw(source)]
            try:
                question = folder.question(shard, key)
            except SampleError as error:
                if health is not None:
                    health.bad(f"{shard}:{key}", error.reason, str(error))
                continue
            if health is not None:
                health.good()
            self._delivered[source] += 1
            return question
        raise DataError(
            f"{folder.path}: no good sample in a whole epoch, got {len(folder)} bad ones; run "
            "tools/make_shards.py lint on it"
        )

    def _draw(self, source: int) -> int:
        """Return the next sample number of a source."""
        epoch, position = divmod(self._positions[source], len(self._folders[source]))
        order = self._orders[source]
        if order is None or order[0] != epoch:
            order = self._orders[source] = (epoch, self._permutation(source, epoch))
        self._positions[source] += 1
        return int(order[1][position])

    def _permutation(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        name = f"stream/{self._seed}/{source}/{epoch}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key)).permutation(
            len(self._folders[source])
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position, as JSON values; its size does not grow with the
        position.
        """
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "sources": [dict(source) for source in self._sources],
            "delivered": list(self._delivered),
            "positions": list(self._positions),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at another stream's position.

        Raises:
            DataError: The seed or the sources are not those of the saved stream; the message says
                what changed.
        """
        if state["version"] != STATE_VERSION:
            raise DataError(
                f"QuestionStream: state of another version, got {state['version']}, expected "
                f"{STATE_VERSION}; start again"
            )
        changes = self._changes(state)
        if changes:
            listed = "; ".join(changes)
            raise DataError(
                f"QuestionStream: the data changed since the checkpoint: {listed}; restore them or "
                "start a new run"
            )
        self._delivered = [int(count) for count in state["delivered"]]
        self._positions = [int(position) for position in state["positions"]]
        self.health.load_state_dict(state["health"])

    def _changes(self, state: dict[str, Any]) -> list[str]:
        changes = []
        if state["seed"] != self._seed:
            changes.append(f"seed was {state['seed']}, is {self._seed}")
        saved, present = state["sources"], self._sources
        if len(saved) != len(present):
            return [*changes, f"number of sources was {len(saved)}, is {len(present)}"]
        for before, now in zip(saved, present, strict=True):
            different = [
                f"{name} was {before[name]}, is {now[name]}"
                for name in now
                if before[name] != now[name]
            ]
            changes += [f"source {now['path']}: {text}" for text in different]
        return changes

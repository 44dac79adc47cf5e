"""Which block of the cache belongs to whom: bookkeeping on the host, without any tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zppo_mm.experience import IntArray


@dataclass(frozen=True, slots=True)
class Moves:
    """What has to be copied where, all at once, before what was given back is written again.

    Attributes:
        sources: `[moves]` old indices; none of them is also a target.
        targets: `[moves]` new indices.
    """

    sources: IntArray
    targets: IntArray

    def __bool__(self) -> bool:
        return len(self.sources) > 0

    @staticmethod
    def closing_gaps(gone: IntArray, size: int) -> Moves:
        """Return the moves after which the first indices are in use without a gap.

        Args:
            gone: Indices given back, each once.
            size: Indices in use until now, from 0.
        """
        left = size - len(gone)
        stays = np.ones(size, bool)
        stays[gone] = False
        return Moves(np.flatnonzero(stays[left:]) + left, np.flatnonzero(~stays[:left]))


class BlockTable:
    """Blocks of owners. Owners and blocks are numbered from 0 without a gap: when some are given
    back, the last ones take their numbers.

    So everything in use lies at the beginning of a tensor, and a kernel reads it whole.

    Attributes:
        num_owners: Owners now.
        num_blocks: Blocks in use now.
        counts: `[owners]` blocks of each.
        table: `[owners, most blocks]` the blocks of each in their order; what follows has no
            meaning.
        owners: `[blocks]` the owner of each.
    """

    def __init__(self) -> None:
        self.num_owners = self.num_blocks = 0
        self._counts = np.zeros(1, np.int64)
        self._table = np.zeros((1, 1), np.int64)
        self._owners = np.zeros(1, np.int64)
        self._columns = np.zeros(1, np.int64)

    @property
    def counts(self) -> IntArray:
        return self._counts[: self.num_owners]

    @property
    def table(self) -> IntArray:
        return self._table[: self.num_owners, : max(self.counts, default=0)]

    @property
    def owners(self) -> IntArray:
        return self._owners[: self.num_blocks]

    def add(self, count: int) -> IntArray:
        """Add an owner of so many blocks, which are returned in their order."""
        owner = self.num_owners
        self.num_owners += 1
        self._counts = _with_room(self._counts, self.num_owners)
        self._table = _with_room(self._table, self.num_owners, count)
        self._counts[owner] = 0
        return self._give(np.full(count, owner), np.arange(count))

    def extend(self, owners: IntArray) -> IntArray:
        """Give each of these owners, all different, one more block; returns the blocks."""
        self._table = _with_room(self._table, 0, max(self._counts[owners], default=0) + 1)
        return self._give(owners, self._counts[owners])

    def _give(self, owners: IntArray, columns: IntArray) -> IntArray:
        blocks = np.arange(self.num_blocks, self.num_blocks + len(owners))
        self.num_blocks += len(owners)
        self._owners = _with_room(self._owners, self.num_blocks)
        self._columns = _with_room(self._columns, self.num_blocks)
        self._owners[blocks], self._columns[blocks] = owners, columns
        self._table[owners, columns] = blocks
        np.add.at(self._counts, owners, 1)
        return blocks

    def remove(self, owners: IntArray) -> tuple[Moves, Moves]:
        """Give back these owners, all different, with their blocks; returns how owners and blocks
        are numbered then.
        """
        gone = np.zeros(self.num_owners, bool)
        gone[owners] = True
        blocks = Moves.closing_gaps(np.flatnonzero(gone[self.owners]), self.num_blocks)
        self._owners[blocks.targets] = self._owners[blocks.sources]
        self._columns[blocks.targets] = self._columns[blocks.sources]
        self._table[self._owners[blocks.targets], self._columns[blocks.targets]] = blocks.targets
        self.num_blocks -= int(self._counts[owners].sum())
        rows = Moves.closing_gaps(np.flatnonzero(gone), self.num_owners)
        self._counts[rows.targets] = self._counts[rows.sources]
        self._table[rows.targets] = self._table[rows.sources]
        renumbered = np.arange(self.num_owners)
        renumbered[rows.sources] = rows.targets
        self._owners[: self.num_blocks] = renumbered[self.owners]
        self.num_owners -= len(owners)
        return rows, blocks


def _with_room(array: IntArray, *sizes: int) -> IntArray:
    """Return the array, in a larger one if it is smaller than that in any axis."""
    if all(have >= want for have, want in zip(array.shape, sizes, strict=False)):
        return array
    # Twice as much, so that growing one by one copies each entry a few times only.
    larger = np.zeros(
        [
            have if have >= want else 2 * want
            for have, want in zip(array.shape, (*sizes, *array.shape[len(sizes) :]), strict=True)
        ],
        np.int64,
    )
    larger[tuple(map(slice, array.shape))] = array
    return larger

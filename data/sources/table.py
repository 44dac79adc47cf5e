"""What every kind of table file can do: any row by its index, and any cell of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

CONVERT = "python tools/make_shards.py {file} FOLDER"
"""What turns a file that has no rows by index into shards."""


class Table(Protocol):
    """One file of rows. Safe to use from several threads."""

    @property
    def path(self) -> Path:
        """Return the file's path."""
        ...

    @property
    def schema_columns(self) -> Sequence[str] | None:
        """Return the names of the columns, and of what is in objects with dots; `None` where each
        row has its own.
        """
        ...

    @property
    def held_columns(self) -> Sequence[str]:
        """Return the columns that hold bytes; of an object that is no picture, what inside it
        does.
        """
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def key(self, index: int) -> str:
        """Return the number of a row from 1, which messages and references name."""
        ...

    def index(self, key: str) -> int:
        """Return which row has a key.

        Raises:
            DataError: None has.
        """
        ...

    def row(self, index: int, skip: Set[str]) -> Mapping[str, Any]:
        """Return one row, with `HELD` for bytes that are not read with it.

        Args:
            index: From 0.
            skip: Columns that are left out.

        Raises:
            SampleError: The row cannot be read.
            DataError: The file cannot be read, or was changed.
        """
        ...

    def cell(self, index: int, column: str) -> Any:
        """Return what one row has in a column, or below it with a dot; raises as `row`."""
        ...

    def fingerprint(self) -> str:
        """Return a digest that another content changes."""
        ...

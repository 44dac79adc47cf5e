"""Parquet by row: the footer says which row group has it. Questions are read without the bytes of
their pictures, and those only where they are opened.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.sources.arrow_values import (
    class_labels,
    column_paths,
    held_columns,
    holds_bytes,
    is_picture,
    light_row,
    row_of_key,
    with_labels,
)
from data.sources.rows import HELD, check_names, row_value
from data.sources.table import CONVERT

if TYPE_CHECKING:
    from pyarrow import DataType, FileMetaData, Table
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 32
"""Rows with their pictures in memory at once."""
MAX_GROUP_BYTES = 1 << 28
"""Uncompressed, of a row group, half of which is read on average for one picture."""
KEPT_BYTES = 64 << 20
"""Of row groups without their pictures that are kept for the next questions."""


@contextmanager
def open_parquet(path: Path, metadata: FileMetaData | None = None) -> Iterator[ParquetFile]:
    """Open a file; its footer is not read again if the caller has it.

    Raises:
        DataError: It cannot be read, or two columns have one name.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except Exception as error:
        raise DataError(
            f"{path}: Parquet needs pyarrow, which cannot be imported ({error}); install pyarrow, "
            "the `parquet` extra"
        ) from error
    try:
        with ParquetFile(path, metadata=metadata, memory_map=metadata is not None) as file:
            if metadata is None:
                check_names(path, file.schema_arrow.names)
            yield file
    except ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the file") from error


class ParquetTable:
    """One Parquet file; see `data.sources.table.Table`."""

    def __init__(self, path: Path) -> None:
        """Read the footer.

        Raises:
            DataError: The file cannot be read, has no rows, or row groups too large to read a row
                from.
        """
        self.path = path
        self._size = path.stat().st_size if path.is_file() else 0
        with open_parquet(path) as file:
            self._metadata = file.metadata
            schema = file.schema_arrow
        self.schema_columns: Sequence[str] | None = column_paths(schema)
        self.held_columns: Sequence[str] = held_columns(schema)
        self._types = dict(zip(schema.names, schema.types, strict=True))
        self._labels = class_labels(schema)
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))
        if not len(self):
            raise DataError(f"{path}: no rows, got an empty table; write it again")
        largest = max(group.total_byte_size for group in groups)
        if largest > MAX_GROUP_BYTES and self.held_columns:
            raise DataError(
                f"{path}: its row groups are too large to read single rows from, got "
                f"{largest} bytes, expected at most {MAX_GROUP_BYTES}; write it with smaller "
                f"row groups, or turn it into shards: {CONVERT.format(file=path)}"
            )
        self._kept: OrderedDict[tuple[int, frozenset[str]], tuple[Table, Set[str]]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, index: int) -> str:
        """Return the number of the row from 1."""
        return str(index + 1)

    def index(self, key: str) -> int:
        """Return which row has a key; see `Table.index`."""
        return row_of_key(self.path, key, len(self))

    def row(self, index: int, skip: Set[str]) -> Mapping[str, Any]:
        """Return one row; see `Table.row`."""
        group, offset = self._position(index)
        table, inline = self._questions(group, frozenset(skip))
        where = f"{self.path}:{index + 1}"
        values = {name: table.column(name)[offset] for name in table.column_names}
        row = light_row(where, values)
        for name in inline:
            row[name] = _with_held(row.get(name))
        return with_labels(row, self._labels)

    def cell(self, index: int, column: str) -> Any:
        """Return what one row has in a column; see `Table.cell`."""
        group, offset = self._position(index)
        top = column if column in self._types else column.split(".")[0]
        with self._opened() as file:
            for batch in file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[top], use_threads=False
            ):
                if offset < batch.num_rows:
                    return row_value({top: batch.column(0)[offset].as_py()}, column)
                offset -= batch.num_rows
        raise DataError(f"{self.path}: row {index + 1} is missing; download the file again")

    def fingerprint(self) -> str:
        """Return a digest of the footer, which has size and place of every column's pages."""
        digest = hashlib.blake2b(digest_size=16)
        footer = min(self._metadata.serialized_size + 8, self._size)
        with self.path.open("rb") as file:
            file.seek(self._size - footer)
            digest.update(file.read())
        return digest.hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[ParquetFile]:
        """Open the file for one read, so that threads do not share one reader."""
        if (found := self.path.stat().st_size if self.path.is_file() else 0) != self._size:
            raise DataError(
                f"{self.path}: the file was changed, got {found} bytes, expected {self._size} as "
                "at the start; restore it"
            )
        with open_parquet(self.path, self._metadata) as file:
            yield file

    def _position(self, index: int) -> tuple[int, int]:
        group = bisect_right(self._ends, index)
        return group, index - (self._ends[group - 1] if group else 0)

    def _questions(self, group: int, skip: frozenset[str]) -> tuple[Table, Set[str]]:
        """Return a row group without its pictures, and the columns whose bytes were not read."""
        with self._lock:
            if (group, skip) in self._kept:
                self._kept.move_to_end((group, skip))
                return self._kept[group, skip]
        columns, inline = self._light_columns(group, skip)
        with self._opened() as file:
            table = file.read_row_group(group, columns=columns, use_threads=False)
        with self._lock:
            self._kept[group, skip] = table, inline
            while sum(kept.nbytes for kept, _ in self._kept.values()) > KEPT_BYTES:
                if len(self._kept) == 1:
                    break
                self._kept.popitem(last=False)
        return table, inline

    def _light_columns(self, group: int, skip: frozenset[str]) -> tuple[list[str], set[str]]:
        """Return what of the columns is read with a question, and which columns have bytes in
        every row and are read without them: of a list of pictures only the paths, which are as
        many.
        """
        found = self._metadata.row_group(group)
        leaves = {
            (leaf := found.column(number)).path_in_schema: leaf.statistics
            for number in range(found.num_columns)
        }
        columns, inline = [], set[str]()
        for name, kind in self._types.items():
            if name in skip:
                continue
            parts = _leaves_of_pictures(name, kind, leaves) if holds_bytes(kind) else None
            if parts is None:
                columns.append(name)
                continue
            content, others = parts
            statistics = leaves[content]
            if statistics is None or not statistics.has_null_count or statistics.null_count:
                columns.append(name)
            else:
                inline.add(name)
                columns += others
        return columns, inline


def _leaves_of_pictures(
    name: str, kind: DataType, leaves: Mapping[str, Any]
) -> tuple[str, list[str]] | None:
    """Return the leaf with the bytes of a column of pictures and the one with their paths, `None`
    for a column of another form.
    """
    if name in leaves:
        return name, []
    paths = [leaf for leaf in leaves if leaf.startswith(f"{name}.") and leaf.endswith(".path")]
    contents = [leaf for leaf in leaves if leaf.startswith(f"{name}.") and leaf.endswith(".bytes")]
    if len(paths) == len(contents) == 1 and _is_picture(kind):
        return contents[0], paths
    return None


def _is_picture(kind: DataType) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return is_picture(kind)


def _with_held(value: Any) -> Any:
    """Put back what stands for the bytes that were not read."""
    if isinstance(value, list):
        return [_with_held(entry) for entry in value]
    return {**value, "bytes": HELD} if isinstance(value, dict) else HELD

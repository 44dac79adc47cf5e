"""Arrow files as the `datasets` package saves them: mapped into memory, so that any row is there
without being read before.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.sources.arrow_values import (
    class_labels,
    column_paths,
    held_columns,
    light_row,
    row_of_key,
    with_labels,
)
from data.sources.rows import check_names, row_value
from data.sources.table import CONVERT

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema


class ArrowTable:
    """One Arrow file or stream; see `data.sources.table.Table`."""

    def __init__(self, path: Path) -> None:
        """Map the file and find its batches.

        Raises:
            DataError: It cannot be read, has no rows, or is compressed, so that its rows would all
                have to be in memory.
        """
        self.path = path
        self._state = _state_of(path)
        self._size = path.stat().st_size if path.is_file() else 0
        with open_arrow(path) as (schema, batches):
            self._batches = list(_uncompressed(path, batches, self._size))
        check_names(path, schema.names)
        self.schema_columns: Sequence[str] | None = column_paths(schema)
        self.held_columns: Sequence[str] = held_columns(schema)
        self._labels = class_labels(schema)
        self._schema = schema
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        if not len(self):
            raise DataError(f"{path}: no rows, got an empty table; save it again")

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
        batch, offset = self._position(index)
        values = {
            name: batch.column(number)[offset]
            for number, name in enumerate(self._schema.names)
            if name not in skip
        }
        return with_labels(light_row(f"{self.path}:{index + 1}", values), self._labels)

    def cell(self, index: int, column: str) -> Any:
        """Return what one row has in a column; see `Table.cell`."""
        batch, offset = self._position(index)
        top = column if column in self._schema.names else column.split(".")[0]
        value = batch.column(self._schema.names.index(top))[offset].as_py()
        return row_value({top: value}, column)

    def fingerprint(self) -> str:
        """Return a digest of columns, sizes of the batches, and the size of the file."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self._schema.serialize())
        digest.update(str((self._size, self._ends)).encode())
        return digest.hexdigest()

    def _position(self, index: int) -> tuple[RecordBatch, int]:
        if _state_of(self.path) != self._state:
            raise DataError(
                f"{self.path}: the file was changed or replaced, got another size or time, "
                "expected the file of the start; restore it, with its time, or start again"
            )
        batch = bisect_right(self._ends, index)
        return self._batches[batch], index - (self._ends[batch - 1] if batch else 0)


def _state_of(path: Path) -> tuple[int, ...]:
    """Return what another file, or another content, has different; nothing of a missing file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def open_arrow(path: Path) -> Iterator[tuple[Schema, Iterator[RecordBatch]]]:
    """Map a file or a stream; yields its columns and batches, which stay mapped as long as they are
    used.

    Raises:
        DataError: It cannot be read.
    """
    try:
        from pyarrow import ArrowException, ArrowInvalid, ipc, memory_map
    except Exception as error:
        raise DataError(
            f"{path}: Arrow files need pyarrow, which cannot be imported ({error}); install "
            "pyarrow, the `parquet` extra"
        ) from error
    try:
        with memory_map(str(path)) as mapped:
            try:
                reader = ipc.open_file(mapped)
            except ArrowInvalid:
                mapped.seek(0)
                stream = ipc.open_stream(mapped)
                yield stream.schema, iter(stream)
            else:
                numbers = range(reader.num_record_batches)
                yield reader.schema, (reader.get_batch(number) for number in numbers)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Arrow ({error}); save it again") from error


def _uncompressed(path: Path, batches: Iterator[RecordBatch], size: int) -> Iterator[RecordBatch]:
    """Yield the batches as long as they take no more than the file."""
    total = 0
    for batch in batches:
        # Without dictionaries, which batches share.
        buffers = (buffer for column in batch.columns for buffer in column.buffers())
        total += sum(buffer.size for buffer in buffers if buffer is not None)
        if total > size:
            raise DataError(
                f"{path}: compressed, so that its rows cannot be read one by one, got {total} "
                f"bytes in a file of {size}; save it uncompressed, or turn it into shards: "
                f"{CONVERT.format(file=path)}"
            )
        yield batch

"""Any media file by reference: a member of a shard, a cell of a table, a file of a folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from data.errors import DataError, SampleError
from data.files import LOCAL, LocalFiles
from data.media_folder import MediaFolder
from data.question import MediaRef
from data.shards import ShardReader
from data.sources.listing import TABLES
from data.sources.references import cell_position, file_path
from data.sources.rows import cell_values, content_of
from data.sources.table import Table

NO_LIMIT = 1 << 62
"""Sizes are held against the run's limit before a file is read, by who asks for it."""


class TableFiles:
    """The table files of a process, each indexed at its first use, and kept from then on.

    Args:
        files: Open them; by default those of this machine.
    """

    def __init__(self, files: LocalFiles = LOCAL) -> None:
        self.files = files
        self._tables: dict[str, Table] = {}

    def table(self, path: str) -> Table:
        """Return an indexed file.

        Raises:
            DataError: It cannot be read.
        """
        table = self._tables.get(path)
        if table is None:
            self.files.keep(path)
            table = self._tables[path] = TABLES[Path(path).suffix.lower()](Path(path))
        return table

    def close(self) -> None:
        """Forget the files; the next use indexes them again."""
        self._tables.clear()
        self.files.release()


class SourceReader:
    """Reads media by reference, whatever holds them. Safe to use from several threads.

    A reference says all that is needed: its `shard` is a shard, a table, or a folder (with a slash
    at its end).
    """

    def __init__(self, tables: TableFiles | None = None) -> None:
        self._tables = tables or TableFiles()
        self._files = self._tables.files
        self._shards = ShardReader(files=self._files)
        self._last = threading.local()

    def media_bytes(self, ref: MediaRef) -> bytes:
        """Return the content of a media file, undecoded.

        Raises:
            SampleError: There is no such file.
            DataError: What holds it is missing or was changed.
        """
        if ref.shard.endswith("/"):
            with self._files.at_hand(ref.shard, file_path(ref)):
                return MediaFolder(ref.shard, NO_LIMIT).read(ref.shard, file_path(ref))
        return self._cell(ref) if _is_table(ref) else self._shards.media_bytes(ref)

    def media_size(self, ref: MediaRef) -> int:
        """Return the size of a media file in bytes; raises as `media_bytes`."""
        if ref.shard.endswith("/"):
            with self._files.at_hand(ref.shard, file_path(ref)):
                return MediaFolder(ref.shard, NO_LIMIT).size(ref.shard, file_path(ref))
        return len(self._cell(ref)) if _is_table(ref) else self._shards.media_size(ref)

    def close(self) -> None:
        """Close the files held open; the next read opens them again."""
        self._shards.close()
        self._tables.close()

    def _cell(self, ref: MediaRef) -> bytes:
        """Return what a cell holds; its size is asked for first, and it is not read twice."""
        last: tuple[MediaRef, bytes] | None = getattr(self._last, "read", None)
        if last is not None and last[0] == ref:
            self._last.read = None
            return last[1]
        table = self._tables.table(ref.shard)
        column, index = cell_position(ref)
        values = cell_values(table.cell(table.index(ref.key), column))
        where = f"{ref.shard}:{ref.key}"
        if index >= len(values):
            raise DataError(
                f"{where}: column {column} has no value {index}, got {len(values)}; the file was "
                "changed, restore it"
            )
        content = _content(where, column, values[index])
        self._last.read = ref, content
        return content


def _is_table(ref: MediaRef) -> bool:
    return Path(ref.shard).suffix.lower() in TABLES


def _content(where: str, column: str, value: Any) -> bytes:
    try:
        content = content_of(value)
    except ValueError as error:
        raise SampleError(
            "bad_field", f"{where}: column {column} is no base64 ({error}); write it again"
        ) from error
    if content is None:
        raise SampleError("missing_media", f"{where}: column {column} holds no bytes; add them")
    return content

"""JSON lines by byte offsets: one pass over the file finds where each line begins."""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError, SampleError
from data.json_text import load_object
from data.sources.rows import row_value
from data.tar_members import open_regular, read_at

MAX_LINE_BYTES = 1 << 29


def lines_of(file: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield number, from 1, offset, size and content of every line that is not blank. Of one over
    `MAX_LINE_BYTES` the content is empty.
    """
    number = end = 0
    while content := file.readline(MAX_LINE_BYTES):
        number, start, end = number + 1, end, end + len(content)
        if len(content) == MAX_LINE_BYTES and not content.endswith(b"\n"):
            content = b""
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                end += len(rest)
            end += len(rest)
        elif not content.strip():
            continue
        yield number, start, end - start, content


def too_long(where: str) -> SampleError:
    """Return the error of a line over the limit."""
    expected = f"expected at most {MAX_LINE_BYTES} bytes; put its media into files"
    return SampleError("oversized", f"{where}: the line is too long, {expected}")


class JsonLines:
    """One file of JSON lines; a row is a line that is not blank, its key the line's number."""

    def __init__(self, path: Path) -> None:
        """Find the lines.

        Raises:
            DataError: The file cannot be read, or has no line.
        """
        self.path = path
        self.schema_columns: Sequence[str] | None = None
        self.held_columns: Sequence[str] = ()
        self._numbers, self._offsets, self._sizes = array("q"), array("q"), array("q")
        digest = hashlib.blake2b(digest_size=16)
        with open(open_regular(path, "file"), "rb", buffering=1 << 20) as file:
            for number, offset, size, content in lines_of(file):
                self._numbers.append(number)
                self._offsets.append(offset)
                self._sizes.append(size)
                digest.update(content)
            self._file_size = os.fstat(file.fileno()).st_size
        digest.update(str((self._file_size, len(self._numbers))).encode())
        self._digest = digest.hexdigest()
        if not self._numbers:
            raise DataError(f"{path}: no lines, got an empty file, expected JSON objects; fill it")

    def __len__(self) -> int:
        return len(self._numbers)

    def key(self, index: int) -> str:
        """Return the number of the line."""
        return str(self._numbers[index])

    def index(self, key: str) -> int:
        """Return which row has a key; see `Table.index`."""
        found = bisect_left(self._numbers, int(key))
        if found == len(self._numbers) or self._numbers[found] != int(key):
            raise DataError(
                f"{self.path}: no such line, got {key}; the file was changed, restore it"
            )
        return found

    def row(self, index: int, skip: Set[str]) -> Mapping[str, Any]:
        """Return the object of one line; see `Table.row`."""
        where, size = f"{self.path}:{self._numbers[index]}", self._sizes[index]
        if size > MAX_LINE_BYTES:
            raise too_long(where)
        descriptor = open_regular(self.path, "file")
        try:
            if (found := os.fstat(descriptor).st_size) != self._file_size:
                raise DataError(
                    f"{self.path}: the file was changed, got {found} bytes, expected "
                    f"{self._file_size} as at the start; restore it"
                )
            content = read_at(self.path, descriptor, size, self._offsets[index])
        finally:
            os.close(descriptor)
        row = load_object(where, content)
        return {name: value for name, value in row.items() if name not in skip}

    def cell(self, index: int, column: str) -> Any:
        """Return what one line has in a column; see `Table.cell`."""
        return row_value(self.row(index, frozenset()), column)

    def fingerprint(self) -> str:
        """Return a digest of the whole file."""
        return self._digest

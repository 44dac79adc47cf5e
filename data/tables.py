"""Rows of a table file: JSON, JSON lines, CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.errors import DataError, SampleError

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
PARQUET_BATCH = 32
"""Rows of a Parquet file in memory at once; each may hold pictures."""

Row = Mapping[str, Any]


def read_rows(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    """Yield number, from 1, and columns of every row; a row that cannot be read comes as its error, so that it can be counted.

    A JSON file holds a list of objects, or one object of objects, whose names become the column `id` where they have none.

    Raises:
        DataError: The file is missing, of no known kind, or cannot be read as a whole.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a table ({', '.join(TABLE_SUFFIXES)}); give its path as seen from here")
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _separated, ".tsv": _separated, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown kind of table, got {path.suffix!r}, expected one of {', '.join(TABLE_SUFFIXES)}; convert the file"
        )
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the file") from error


def _json(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON ({error}); write it anew, or name it .jsonl if it has one object a line") from error
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = [{"id": name, **value} for name, value in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path}: no rows, got {type(content).__name__}, expected a list of objects or an object of objects; write it anew")
    for number, value in enumerate(content, start=1):
        yield number, _object(path, number, value)


def _json_lines(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, SampleError("bad_json", f"{path}:{number}: no JSON ({error}); write the line anew")
            else:
                yield number, _object(path, number, value)


def _separated(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    # A field may be a picture or a whole article; the module's own limit is 128 KiB.
    csv.field_size_limit(1 << 30)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        number = 0
        while True:
            number += 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield number, SampleError("bad_row", f"{path}:{number}: not readable ({error}); correct the quotes of row {number}")
                continue
            if row is None:
                return
            if None in row or None in row.values():
                expected = f"expected {len(reader.fieldnames or ())}"
                yield number, SampleError("bad_row", f"{path}:{number}: wrong number of columns, {expected}; correct row {number}")
                continue
            yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except Exception as error:
        raise DataError(
            f"{path}: Parquet needs pyarrow, which cannot be imported ({error}); install pyarrow, the `parquet` extra"
        ) from error
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); download it again") from error


def _object(path: Path, number: int, value: Any) -> Row | SampleError:
    if isinstance(value, dict):
        return value
    return SampleError("bad_json", f"{path}:{number}: no object, got {type(value).__name__}, expected columns; correct it")

"""Rows of a table file: JSON, JSON lines, CSV, TSV, Parquet or Arrow."""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data.errors import DataError, SampleError
from data.json_text import TEXT_RULE, InvalidText, check_texts, load_json, load_object
from data.sources.arrow import open_arrow
from data.sources.arrow_values import class_labels, shortest, with_labels
from data.sources.json_lines import MAX_LINE_BYTES, lines_of, too_long
from data.sources.parquet import open_parquet
from data.sources.rows import check_names

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
MAGIC = {b"PAR1": ".parquet", b"ARRO": ".arrow"}
PARQUET_BATCH = 32
"""Rows of a Parquet file in memory at once; each may hold pictures."""

MAX_JSON_BYTES = 4 << 30

Row = Mapping[str, Any]


def table_kind(path: Path) -> str:
    """Return the suffix that says how a file is read: by its first bytes, or else its own."""
    with path.open("rb") as file:
        return MAGIC.get(file.read(4), path.suffix.lower())


def read_rows(path: Path, kind: str = "") -> Iterator[tuple[int, Row | SampleError]]:
    """Yield number, from 1, and columns of every row; a row that cannot be read comes as its error,
    so that it can be counted.

    A JSON file holds a list of objects, or one object of objects, whose names become the column
    `id` where they have none.

    Args:
        path: The file.
        kind: One of `TABLE_SUFFIXES`; by default its own.

    Raises:
        DataError: The file is missing, of no known kind, or cannot be read as a whole.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, expected a table ({', '.join(TABLE_SUFFIXES)}); give its path "
            "as seen from here"
        )
    readers = {
        ".json": _json,
        ".jsonl": _json_lines,
        ".csv": _separated,
        ".tsv": _separated,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    reader = readers.get(kind or path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown kind of table, got {path.suffix!r}, expected one of "
            f"{', '.join(TABLE_SUFFIXES)}; convert the file"
        )
    try:
        for number, row in reader(path):
            yield number, row if isinstance(row, SampleError) else _checked(path, number, row)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the file") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes | SampleError]]:
    """Yield number, from 1, and content of every line that is not blank; one that is too long comes
    as its error.
    """
    with path.open("rb") as file:
        for number, _, _, content in lines_of(file):
            yield number, content or too_long(f"{path}:{number}")


def _checked(path: Path, number: int, row: Row) -> Row | SampleError:
    try:
        check_texts(row)
    except InvalidText as error:
        return SampleError("bad_text", f"{path}:{number}: {error}, {TEXT_RULE}; correct it")
    return row


def _json(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise DataError(
            f"{path}: too large for JSON, got {size} bytes, expected at most {MAX_JSON_BYTES}; "
            "write one object a line (.jsonl)"
        )
    try:
        content = load_json(path.read_bytes(), is_table=True)
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); write it again, or name it .jsonl if it has one "
            "object a line"
        ) from error
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(value, dict) for value in content.values())
    ):
        content = [{"id": name, **value} for name, value in content.items()]
    if not isinstance(content, list):
        raise DataError(
            f"{path}: no rows, got {type(content).__name__}, expected a list of objects or an "
            "object of objects; write it again"
        )
    for number, value in enumerate(content, start=1):
        if isinstance(value, dict):
            yield number, value
        else:
            yield (
                number,
                SampleError(
                    "bad_json",
                    f"{path}:{number}: not an object, got {type(value).__name__}, expected "
                    "columns; correct it",
                ),
            )


def _json_lines(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    for number, line in read_lines(path):
        try:
            yield (
                number,
                line if isinstance(line, SampleError) else load_object(f"{path}:{number}", line),
            )
        except SampleError as error:
            yield number, error


def _separated(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    # A field may be a picture or a whole article; the module's own limit is 128 KiB.
    csv.field_size_limit(MAX_LINE_BYTES)
    # What is not UTF-8 becomes text that breaks the rule of its row alone.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(
            _physical_lines(path, file),
            delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
            strict=True,
        )
        try:
            check_names(path, reader.fieldnames or ())
        except csv.Error as error:
            raise DataError(
                f"{path}: its first line is not readable ({error}); name the columns there"
            ) from error
        number = 0
        while True:
            number += 1
            first_line = reader.reader.line_num
            try:
                row = next(reader, None)
            except csv.Error as error:
                problem = f"not readable ({error}); correct the quotes of row {number}"
            else:
                if row is None:
                    return
                if None not in row and None not in row.values():
                    if any(map(str.strip, row.values())):  # a line of commas is a blank one
                        yield number, row
                    continue
                problem = (
                    f"wrong number of columns, expected {len(reader.fieldnames or ())}; correct "
                    f"row {number}"
                )
            # An open quote takes the lines after it along, each of which may have been a row.
            for line in range(first_line + 1, max(reader.reader.line_num, first_line + 1) + 1):
                yield number, SampleError("bad_row", f"{path}:{number} (line {line}): {problem}")


def _physical_lines(path: Path, file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise DataError(
                f"{path}: a line is too long, expected at most {MAX_LINE_BYTES} characters; put "
                "its media into files"
            )
        yield line


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, numbers: Sequence[int] | None = None
) -> Iterator[tuple[int, Row | SampleError]]:
    """Yield some rows of a Parquet file as `read_rows` does; what is not asked for is not read.

    Args:
        path: The file.
        columns: Names of the columns; `None` for all.
        numbers: Of the rows, ascending; `None` for all.

    Raises:
        DataError: The file cannot be read, or two columns have one name.
    """
    for number, row in _parquet(path, columns, numbers):
        yield number, row if isinstance(row, SampleError) else _checked(path, number, row)


def parquet_head(path: Path) -> tuple[Schema, int]:
    """Return the columns of a Parquet file and the number of its rows, without reading these.

    Raises:
        DataError: The file cannot be read, or two columns have one name.
    """
    with open_parquet(path) as file:
        return file.schema_arrow, file.metadata.num_rows


def _parquet(
    path: Path, columns: Sequence[str] | None = None, numbers: Sequence[int] | None = None
) -> Iterator[tuple[int, Row | SampleError]]:
    with open_parquet(path) as file:
        labels = class_labels(file.schema_arrow)
        end = 0
        for group in range(file.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            if numbers is not None and not _within(numbers, start, end):
                continue
            number = start
            batches = file.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns)
            for batch in batches:
                for index in range(batch.num_rows):
                    number += 1
                    if numbers is None or _within(numbers, number - 1, number):
                        yield number, _read_row(path, number, batch.slice(index, 1), labels)


def _arrow(path: Path) -> Iterator[tuple[int, Row | SampleError]]:
    with open_arrow(path) as (schema, batches):
        labels, number = class_labels(schema), 0
        for batch in batches:
            for index in range(batch.num_rows):
                number += 1
                yield number, _read_row(path, number, batch.slice(index, 1), labels)


def _within(numbers: Sequence[int], start: int, end: int) -> bool:
    """Return whether any of the ascending numbers is above `start` and at most `end`."""
    found = bisect_left(numbers, start + 1)
    return found < len(numbers) and numbers[found] <= end


def _read_row(
    path: Path, number: int, row: RecordBatch, labels: Mapping[str, Sequence[str]]
) -> Row | SampleError:
    try:
        return with_labels(_values(row), labels)
    except UnicodeDecodeError as error:
        return SampleError("bad_text", f"{path}:{number}: {error}, {TEXT_RULE}; correct it")
    except (ValueError, OverflowError) as error:
        return SampleError(
            "bad_row", f"{path}:{number}: a value is not readable ({error}); correct it"
        )


def _values(row: RecordBatch) -> dict[str, Any]:
    """Return one row; without its times where Python has none of them, such as those of
    nanoseconds.
    """
    from pyarrow.types import is_float32, is_temporal

    try:
        values = dict(row.to_pylist()[0])
    except (ValueError, OverflowError):
        names = [field.name for field in row.schema if not is_temporal(field.type)]
        values = dict(row.select(names).to_pylist()[0])
    for field in row.schema:
        if is_float32(field.type) and values[field.name] is not None:
            values[field.name] = shortest(values[field.name])
    return values

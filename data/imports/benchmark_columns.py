"""Which format the tables of a benchmark have, and which of their columns are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data.errors import DataError, SampleError
from data.imports.benchmark_formats import ANY_TABLE, PARTS, BenchmarkFormat
from data.imports.row_view import split_columns
from data.imports.tables import Row, read_rows
from data.question import ANSWER_TYPES
from data.sources.rows import row_paths


def choose_format(
    tables: Sequence[Path],
    present: set[str],
    format_name: str,
    fields: Mapping[str, str],
    formats: Mapping[str, BenchmarkFormat],
) -> tuple[str, dict[str, str]]:
    """Return the name of the format and the columns by part of a question.

    Raises:
        DataError: The format or a part of a question is unknown, or columns that it cannot do
            without are missing.
    """
    source = tables[0]
    if format_name and format_name not in formats:
        raise DataError(
            f"{source}: unknown format, got {format_name!r}, expected one of {', '.join(formats)}; "
            "correct --format"
        )
    recognised = (name for name, known in formats.items() if known.marks and known.marks <= present)
    name = format_name or next(recognised, ANY_TABLE)
    _check_parts(source, name, fields, formats[name])
    columns = _present_columns(formats[name].columns, present) | dict(fields)
    _check_columns(tables, present, fields)
    missing = [
        part
        for part in ("question", "answer")
        if not {columns[part], columns[part].split(".")[0]} & present
    ]
    if missing and present:
        listed = ", ".join(f"{part}=COLUMN" for part in missing)
        raise DataError(
            f"{source}: no column for {' and '.join(missing)}, got columns "
            f"{', '.join(sorted(present))}; name them: --fields {listed}"
        )
    return name, columns


def _present_columns(declared: Mapping[str, str], present: set[str]) -> dict[str, str]:
    """Return the columns with, of `a|b`, the first that is there; the others are not read."""
    columns = dict(declared)
    for part, written in declared.items():
        first, *others = sorted(written.split("|"), key=lambda column: column not in present)
        columns[part] = first
        if others:
            columns["ignore"] = ",".join([*split_columns(columns["ignore"]), *others])
    return columns


def _check_parts(
    source: Path, name: str, fields: Mapping[str, str], known: BenchmarkFormat
) -> None:
    """Refuse a part that no question has, or that rows of this format are not asked for."""
    wrong = [part for part in fields if part not in PARTS]
    if wrong:
        raise DataError(
            f"{source}: unknown part of a question, got {wrong[0]!r}, expected one of "
            f"{', '.join(PARTS)}; correct --fields"
        )
    unread = [part for part in fields if part not in known.columns]
    if unread:
        expected = ", ".join(known.columns)
        raise DataError(
            f"{source}: {name} has no such part, got {unread[0]!r}, expected one of {expected}; "
            f"use --format {ANY_TABLE}"
        )


def _check_columns(tables: Sequence[Path], present: set[str], fields: Mapping[str, str]) -> None:
    """Refuse a column that the user names and no row has: its questions
    would silently lack it.
    """
    wanted = {
        column
        for part, columns in fields.items()
        if part != "ignore"
        for column in split_columns(columns)
    }
    missing = sorted(wanted - present)
    if fields.get("answer_type") in ANSWER_TYPES:
        missing = [column for column in missing if column != fields["answer_type"]]
    if missing:  # lines need not have the same fields, and objects may be there only later
        later = {path for _, _, row in rows_of(tables) for path in paths_of(row)}
        missing = [column for column in missing if column not in later]
    if missing and present:
        raise DataError(
            f"{tables[0]}: no such column, got {missing[0]!r} in --fields, expected one of "
            f"{', '.join(sorted(present))}; correct it"
        )


def rows_of(tables: Sequence[Path]) -> Iterator[tuple[Path, int, Row | SampleError]]:
    """Yield file, number in it, and columns of every row of some tables."""
    for table in tables:
        for number, row in read_rows(table):
            yield table, number, row


def paths_of(row: Row | SampleError) -> Iterable[str]:
    """Return the columns of a row, and what is in objects with dots."""
    return row_paths(row) if isinstance(row, Mapping) else ()

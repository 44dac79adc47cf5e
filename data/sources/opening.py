"""A source by its path: a folder of shards, or table files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from data.errors import DataError
from data.files import LOCAL, LocalFiles
from data.question import ANSWER_TYPES
from data.remote_files import is_address
from data.shards import ShardFolder, ShardReader
from data.sources.remote import list_source
from data.sources.rows import RowRules
from data.sources.tables import TableSource


def open_source(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    answer_type: str = "",
    media_root: str | Path = "",
    answer_types: Collection[str] = ANSWER_TYPES,
    files: LocalFiles = LOCAL,
) -> ShardFolder | TableSource:
    """Return a source of questions.

    Args:
        path: A folder of shards; a file or folder of JSON lines, Parquet or Arrow, a pattern of
            such files, or a folder that `datasets` saved.
        columns: Of table files: columns by part of a question.
        answer_type: Of their rows that name none.
        media_root: What their media paths start from; by default the folder of the file.
        answer_types: Those that can be graded; other questions are bad samples.
        files: Open its files; by default those of this machine.

    Raises:
        DataError: The source cannot be used.
    """
    rules = RowRules(columns or {}, answer_type)
    listing = list_source(path, files)
    if listing.tables is not None:
        root = files.path_of(str(media_root)) if is_address(str(media_root)) else media_root
        return TableSource(listing.path, listing.tables, rules, root or None, answer_types, files)
    check_no_table_options(path, columns, answer_type, media_root)
    return ShardFolder(listing.path, ShardReader(answer_types, files))


def check_no_table_options(path: str | Path, *options: object) -> None:
    """Refuse options of tables for a folder of shards, to which they do not apply.

    Raises:
        DataError: One is given.
    """
    if any(options):
        raise DataError(
            f"{path}: no table files, got columns, answer_type or media_root, which are for "
            "*.jsonl, *.parquet and *.arrow; remove them or correct the path"
        )

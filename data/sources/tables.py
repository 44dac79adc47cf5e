"""A source of table files: every row is a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import overload

from data.errors import DataError, SampleError
from data.files import LOCAL, LocalFiles
from data.question import ANSWER_TYPES, MediaRef, Question
from data.sample import make_question
from data.shards import SampleKeys
from data.source import Source
from data.sources.listing import TableListing
from data.sources.reader import SourceReader, TableFiles
from data.sources.references import cell_ref, file_ref
from data.sources.rows import (
    IGNORE,
    Medium,
    RowRules,
    question_fields,
    row_paths,
    row_value,
    unread_media,
)
from data.sources.table import Table

ROWS_LOOKED_AT = 20
"""Rows whose columns are held against those that the user names; lines need not have the same."""


class RowKeys(Sequence[str]):
    """The keys of a table's rows, without a list in memory."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self._table.key(range(len(self))[index])


class TableSource:
    """One source of JSON lines, Parquet or Arrow files.

    Attributes:
        path: As the user gave it.
        files: Its tables.
        default_ids: Files that have rows without an id, by what the ids of these begin with.
    """

    def __init__(
        self,
        path: str | Path,
        listing: TableListing,
        rules: RowRules,
        media_root: str | Path | None = None,
        answer_types: Collection[str] = ANSWER_TYPES,
        files: LocalFiles = LOCAL,
    ) -> None:
        """Index the files and hold their columns against the rules.

        Args:
            path: As the user gave it.
            listing: Its files.
            rules: What their columns are.
            media_root: What paths of media start from, and none of them leaves; by default the
                folder of the file that has them.
            answer_types: Those that can be graded; other questions are bad samples.
            files: Open the files; by default those of this machine.

        Raises:
            DataError: A file cannot be read by rows, a column that the user names is not there, or
                one that holds bytes is not read.
        """
        self.path = Path(path)
        self.files = TableFiles(files)
        self._reader = SourceReader(self.files)
        self._listing, self._rules, self._media_root = listing, rules, media_root
        self._answer_types = answer_types
        self._skip = frozenset(rules.of(IGNORE))
        self._prefixes = {str(file): _id_prefix(file, listing) for file in listing.files}
        tables = {str(file): self.files.table(str(file)) for file in listing.files}
        for table in tables.values():
            _check_columns(table, rules)
        self.default_ids = {
            self._prefixes[name]: Path(name)
            for name, table in tables.items()
            if _lacks_ids(table, rules)
        }
        self._keys = SampleKeys({name: RowKeys(table) for name, table in tables.items()})

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> SampleKeys:
        """Return `(file, row)` of every sample in fixed order."""
        return self._keys

    def question(self, shard: str, key: str) -> Question:
        """Return the question of one row.

        Raises:
            SampleError: The row breaks a rule of the format.
            DataError: The file was changed.
        """
        table = self.files.table(shard)
        where = f"{shard}:{key}"
        row = table.row(table.index(key), self._skip)
        default_id = f"{self._prefixes[shard]}/{key}"
        fields, media = question_fields(where, row, self._rules, default_id)
        references = tuple(self._reference(shard, key, medium) for medium in media)
        return make_question(where, fields, references, self._answer_types)

    def media_bytes(self, ref: MediaRef) -> bytes:
        """Return the content of a media file, undecoded; see `SourceReader.media_bytes`."""
        return self._reader.media_bytes(ref)

    def media_size(self, ref: MediaRef) -> int:
        """Return the size of a media file; see `SourceReader.media_size`."""
        return self._reader.media_size(ref)

    def fingerprint(self) -> str:
        """Return a digest of the files, of what their columns are, and of the media root."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self._listing.files:
            table = self.files.table(str(file))
            name = file.relative_to(self._listing.root)
            digest.update(f"{name}\0{len(table)}\0{table.fingerprint()}\0".encode())
        rules = (sorted(self._rules.columns.items()), self._rules.answer_type)
        digest.update(f"{rules}\0{self._listing.state}".encode())
        if self._media_root is not None:
            digest.update(f"\0{self._media_root}".encode())
        return digest.hexdigest()

    def _reference(self, shard: str, key: str, medium: Medium) -> MediaRef:
        if medium.path is None:
            return cell_ref(medium, shard, key)
        return file_ref(medium.kind, self._media_root or Path(shard).parent, medium.path)


def _id_prefix(file: Path, listing: TableListing) -> str:
    """Return what the ids of rows without one begin with: the name of a file that the user names,
    or the folder's and the place in it.
    """
    if listing.is_one_file:
        return file.stem
    return f"{listing.root.absolute().name}/{file.relative_to(listing.root).with_suffix('')}"


def check_default_ids(sources: Sequence[Source]) -> None:
    """Refuse sources of one run whose rows without an id would get the same ones.

    Raises:
        DataError: Two files would.
    """
    files: dict[str, Path] = {}
    for source in sources:
        for prefix, file in source.default_ids.items() if isinstance(source, TableSource) else ():
            other = files.setdefault(prefix, file)
            if other.resolve() != file.resolve():
                raise DataError(
                    f"{file}: its rows have no id and would get those of {other}, got "
                    f"{prefix + '/1'!r} from both, expected different ones; name columns: "
                    "{id: COLUMN}, rename a file, or give folders of different names as the paths"
                )


def _lacks_ids(table: Table, rules: RowRules) -> bool:
    """Return whether rows have no id; looks at some where each has columns of its own."""
    columns = rules.of("id")
    if table.schema_columns is not None:
        return not _has(set(table.schema_columns), columns)
    rows = islice(_rows(table), ROWS_LOOKED_AT)
    return any(all(row_value(row, column) is None for column in columns) for row in rows)


def _check_columns(table: Table, rules: RowRules) -> None:
    """Refuse a table whose columns are not those that the rules expect.

    Raises:
        DataError: One that the user names, or that every question needs, is missing, or one that
            holds bytes is not read.
    """
    rows = _rows(table) if table.schema_columns is None else iter(())
    present = set(table.schema_columns or ()) | _columns(islice(rows, ROWS_LOOKED_AT))
    needed = {
        "question": [*rules.of("question"), *rules.of("messages")],
        "answer": rules.of("answer"),
    }
    missing = [part for part, columns in needed.items() if not _has(present, columns)]
    if present and missing:
        listed = ", ".join(f"{part}: COLUMN" for part in missing)
        raise DataError(
            f"{table.path}: no column for {' and '.join(missing)}, got columns "
            f"{', '.join(_listed(present))}; name them: columns: {{{listed}}}"
        )
    unknown = [column for column in sorted(rules.named()) if not _has(present, [column])]
    if unknown:
        present |= _columns(rows)
        unknown = [column for column in unknown if not _has(present, [column])]
    if unknown:
        raise DataError(
            f"{table.path}: no such column, got {unknown[0]!r} in columns, expected one of "
            f"{', '.join(_listed(present, unknown[0].split('.')[0]))}; correct it"
        )
    read = rules.read()
    unread = [column for column in table.held_columns if not _is_read(column, read)]
    if unread:
        raise DataError(str(unread_media(f"{table.path}:1", unread)))


def _has(present: set[str], columns: Sequence[str]) -> bool:
    return any(column in present for column in columns)


def _is_read(column: str, read: set[str]) -> bool:
    """Return whether a column that holds bytes is read: itself, what it is in, or its bytes."""
    above = accumulate(column.split("."), "{}.{}".format)
    return f"{column}.bytes" in read or any(each in read for each in above)


def _listed(present: set[str], inside: str = "") -> list[str]:
    """Return the columns for a message; what is in objects only of one of them."""
    return sorted(
        column
        for column in present
        if column.rpartition(".")[0] not in present or column.startswith(f"{inside}.")
    )


def _rows(table: Table) -> Iterator[Mapping[str, object]]:
    for index in range(len(table)):
        try:
            yield table.row(index, frozenset())
        except SampleError:  # counted when it is drawn
            continue


def _columns(rows: Iterator[Mapping[str, object]]) -> set[str]:
    return set(chain.from_iterable(map(row_paths, rows)))

"""Which rows a corpus may take, and in which order: every filter that needs no image, and a draw
that depends on a sample's content alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError, SampleError
from data.imports.row_view import RowView
from data.imports.tables import Row, parquet_head, read_parquet
from zppo_mm.corpus.questions import Draft, read_draft
from zppo_mm.corpus.recipe import FROM_FOLDER, CorpusRecipe, SourceSet

if TYPE_CHECKING:
    from pyarrow import Schema

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
UNREADABLE = "(unreadable rows)"
"""In place of the subset of rows whose subset cannot be read."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Parquet file of a set."""

    source: SourceSet
    root: Path
    path: Path

    @property
    def name(self) -> str:
        """The path below the set's folder, the same wherever that lies."""
        return self.path.relative_to(self.root).as_posix()

    def rows(
        self, parts: Sequence[str], numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[int, RowView | SampleError]]:
        """Yield rows seen through the columns of some parts; nothing else is read."""
        columns = {
            part: column for part, column in self.source.columns.used().items() if part in parts
        }
        present = set(parquet_head(self.path)[0].names)
        heads = {
            column if column in present else column.split(".")[0] for column in columns.values()
        }
        for number, row in read_parquet(self.path, sorted(heads), numbers):
            yield number, row if isinstance(row, SampleError) else self._view(number, row, columns)

    @property
    def whole_subset(self) -> str | None:
        """The set's own name of the subset of all rows, `None` if a column says it of each."""
        return self.path.parent.name if self.source.columns.subset == FROM_FOLDER else None

    def subset(self, view: RowView) -> str:
        """Return the set's own name of a row's subset."""
        whole = self.whole_subset
        return ", ".join(map(str, view.values("subset"))) if whole is None else whole

    def _view(self, number: int, row: Row, columns: Mapping[str, str]) -> RowView:
        return RowView(f"{self.path}:{number}", number, self.path.stem, row, columns)


@dataclass(slots=True)
class Counts:
    """What became of the rows: by set, the set's own name of the subset, and reason; kept samples
    have the reason `kept`.
    """

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    fates: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    answer_types: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that a corpus may take.

    Attributes:
        digest: Of its content; two candidates with one digest are one question.
        file: Index of its file.
        number: Of its row.
        subset: The set's own name of its subset.
    """

    digest: bytes
    file: int
    number: int
    subset: str


def list_files(recipe: CorpusRecipe, roots: Mapping[str, Path]) -> list[SourceFile]:
    """Return the files of all sets in an order that does not depend on the file system, their
    columns checked.

    Raises:
        DataError: A set has no folder or no files, or a file lacks a column.
    """
    names = [source.name for source in recipe.sets]
    if sorted(roots) != sorted(names):
        raise DataError(
            f"corpus: folders and sets differ, got folders for {', '.join(roots) or 'none'}, "
            f"expected one for each of {', '.join(names)}; give --sets NAME=DIR for every set"
        )
    files = []
    for source in recipe.sets:
        root = roots[source.name]
        found = sorted(root.glob(source.files), key=lambda path: path.as_posix())
        if not found:
            raise DataError(
                f"corpus: {source.name} has no files, got nothing at {root / source.files}, "
                "expected Parquet files; correct the folder, or `files` in the recipe"
            )
        files += [SourceFile(source, root, path) for path in found]
    for file in files:
        if file.whole_subset is None or _refusal(recipe, file.source, file.whole_subset) is None:
            _check_columns(file)
    return files


def _refusal(recipe: CorpusRecipe, source: SourceSet, subset: str) -> str | None:
    """Return the reason for which no row of a subset is taken, `None` if there is none."""
    canonical = source.subsets.get(subset)
    if canonical is None:
        return "other_subset"
    return None if recipe.set_of(canonical) == source.name else "merged"


def _check_columns(file: SourceFile) -> None:
    schema, _ = parquet_head(file.path)
    missing = [
        f"{part} ({column})"
        for part, column in file.source.columns.used().items()
        if not _has_column(schema, column)
    ]
    if missing:
        listed = ", ".join(f"{each.name}: {each.type}" for each in schema)
        raise DataError(
            f"{file.path}: no such column, got none for {', '.join(missing)} of "
            f"{file.source.name}, expected one of {listed}; correct `columns` in the recipe"
        )


def _has_column(schema: Schema, dotted: str) -> bool:
    if dotted in schema.names:
        return True
    name, *inner = dotted.split(".")
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    for part in inner:
        names = [kind.field(index).name for index in range(kind.num_fields)]
        if part not in names:
            return False
        kind = kind.field(names.index(part)).type
    return True


class Draw:
    """The candidates of every canonical subset, each in the order in which they are taken.

    Holds a few hundred bytes per candidate, never texts or images.
    """

    def __init__(self, recipe: CorpusRecipe, files: Sequence[SourceFile], counts: Counts) -> None:
        """Read the texts of all rows once.

        Raises:
            DataError: A file cannot be read, or a subset of the recipe has no rows.
        """
        self._recipe = recipe
        pools: dict[str, dict[bytes, Candidate]] = defaultdict(dict)
        for index, file in enumerate(files):
            if self._leave_out(file, counts):
                continue
            logger.info("corpus: reading the texts of %s/%s", file.source.name, file.name)
            for number, view in file.rows(_text_parts(file.source)):
                self._add(pools, index, file, number, view, counts)
        _check_subsets(recipe, counts)
        self._waiting = {
            subset: sorted(pool.values(), key=lambda candidate: candidate.digest, reverse=True)
            for subset, pool in sorted(pools.items())
        }

    def take(self, subset: str, most: int) -> list[Candidate]:
        """Return the next candidates of a canonical subset."""
        waiting = self._waiting.get(subset, [])
        return [waiting.pop() for _ in range(min(most, len(waiting)))]

    @property
    def left(self) -> Iterator[Candidate]:
        """All candidates that were not taken."""
        return (candidate for waiting in self._waiting.values() for candidate in waiting)

    def _leave_out(self, file: SourceFile, counts: Counts) -> bool:
        """Count the rows of a file that is not read because its subset is not taken."""
        subset = file.whole_subset
        reason = None if subset is None else _refusal(self._recipe, file.source, subset)
        if subset is None or reason is None:
            return False
        _, num_rows = parquet_head(file.path)
        counts.rows[file.source.name, subset] += num_rows
        counts.fates[file.source.name, subset, reason] += num_rows
        return True

    def _add(
        self,
        pools: dict[str, dict[bytes, Candidate]],
        index: int,
        file: SourceFile,
        number: int,
        view: RowView | SampleError,
        counts: Counts,
    ) -> None:
        """Make a row a candidate, or count why not."""
        name = file.source.name
        subset = UNREADABLE if isinstance(view, SampleError) else file.subset(view)
        counts.rows[name, subset] += 1
        try:
            if isinstance(view, SampleError):
                raise view
            reason = _refusal(self._recipe, file.source, subset)
            if reason is not None:
                raise SampleError(reason, f"{view.where}: subset {subset!r} is not taken")
            draft = read_draft(view, self._recipe, file.source)
        except SampleError as error:
            counts.fates[name, subset, error.reason] += 1
            return
        digest = _digest(self._recipe.seed, file, subset, view, draft)
        candidate = Candidate(digest, index, number, subset)
        if pools[file.source.subsets[subset]].setdefault(digest, candidate) is not candidate:
            counts.fates[name, subset, "duplicate"] += 1


def _text_parts(source: SourceSet) -> list[str]:
    return [part for part in source.columns.used() if part != "image"]


def _digest(seed: int, file: SourceFile, subset: str, view: RowView, draft: Draft) -> bytes:
    """Return what orders a sample; neither the order nor the names of files matter where the set
    has ids.
    """
    own = view.values("id")
    identity = str(own[0]) if own else f"{file.name}:{view.number}"
    parts = (file.source.name, subset, identity, draft.text, draft.answer, *draft.choices)
    content = b"".join(
        len(encoded).to_bytes(8, "big") + encoded for encoded in (part.encode() for part in parts)
    )
    key = seed.to_bytes(8, "big", signed=True)
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES, key=key).digest()


def _check_subsets(recipe: CorpusRecipe, counts: Counts) -> None:
    """Refuse a recipe with subsets that no row belongs to: they would be missing unseen."""
    for source in recipe.sets:
        present = {subset for name, subset in counts.rows if name == source.name}
        missing = sorted(source.subsets.keys() - present)
        if missing:
            raise DataError(
                f"corpus: {source.name} has no rows of some subsets, got none of "
                f"{', '.join(missing)}, expected each of the recipe among "
                f"{', '.join(sorted(present))}; correct the names in the recipe, or remove them"
            )

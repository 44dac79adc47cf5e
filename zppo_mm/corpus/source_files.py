"""The Parquet files of the sets that a corpus is drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError, SampleError
from data.imports.row_view import RowView
from data.imports.tables import Row, parquet_head, read_parquet
from zppo_mm.corpus.recipe import FROM_FOLDER, CorpusRecipe, SourceSet

if TYPE_CHECKING:
    from pyarrow import Schema


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Parquet file of a set.

    Attributes:
        source: The set.
        root: Its folder.
        path: The file.
    """

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
        if file.whole_subset is None or refusal(recipe, file.source, file.whole_subset) is None:
            _check_columns(file)
    return files


def refusal(recipe: CorpusRecipe, source: SourceSet, subset: str) -> str | None:
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

"""Which rows a corpus may take, and in which order: every filter that needs no image, and a draw
that depends on a sample's content alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data.errors import DataError, SampleError
from data.imports.row_view import RowView
from data.imports.tables import parquet_head
from zppo_mm.corpus.questions import Draft, read_draft
from zppo_mm.corpus.recipe import CorpusRecipe, SourceSet
from zppo_mm.corpus.source_files import SourceFile, refusal

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
KEPT = "kept"
"""The fate of samples, where that of other rows is the reason for which they are left out."""
UNREADABLE = "(unreadable rows)"
"""In place of the subset of rows whose subset cannot be read."""


@dataclass(slots=True)
class Counts:
    """What became of the rows.

    Attributes:
        rows: By set and the set's own name of the subset.
        fates: The same, by `KEPT` or reason too.
        answer_types: Kept samples by set and answer type.
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
        reason = None if subset is None else refusal(self._recipe, file.source, subset)
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
            reason = refusal(self._recipe, file.source, subset)
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
